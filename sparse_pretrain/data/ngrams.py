"""Where a memory's rows lie: hashes of the last tokens of a document, found on the host.

A hash multiplies 64-bit numbers, of which JAX has none by default; row numbers fit in 32 bits.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, normalizers

from sparse_pretrain.data.tokenize import Tokenizer
from sparse_pretrain.model import engram
from sparse_pretrain.shapes import Batch

BLANK = "\ue000"  # stands for a lone blank while blanks are stripped
BROKEN = "\ufffd"  # of a token that is part of a character
LAYER = 10007  # what a layer's number is multiplied with to seed its multipliers


def compressed(tokenizer: Any) -> Int[np.ndarray, " V"]:
    """Every id's number among ids that read alike: without accents, in lower case, blanks as one.

    Source: 2601.07372, section 2.2; CompressedTokenizer of engram_demo_v1.py.
    Differs: the symbols of a synthetic task are no text, and all differ.
    """
    if not tokenizer.is_text:
        return np.arange(tokenizer.vocab)
    alike = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), BLANK),
            normalizers.Strip(),
            normalizers.Replace(BLANK, " "),
        ]
    )
    inner, known = tokenizer.inner, dict[str, int]()
    ids = np.zeros(tokenizer.vocab, np.int64)
    for i in range(tokenizer.vocab):
        text = inner.decode([i], skip_special_tokens=False)
        name = inner.id_to_token(i) if BROKEN in text else alike.normalize_str(text) or text
        ids[i] = known.setdefault(name, len(known))
    return ids


@dataclasses.dataclass(frozen=True, eq=False)
class Addresses:
    """The rows that tokens read.

    Shapes: `ids` [V], `multipliers` [memories, longest n-gram], odd.
    """

    config: engram.Config
    ids: Int[np.ndarray, " V"]
    multipliers: Int[np.ndarray, "places n"]
    pad: int

    @functools.cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows of each table, where it begins in its memory's array), [A] of all memories."""
        tables = [np.array(sizes) for sizes in engram.tables(self.config)]
        begins = [np.concatenate([[0], np.cumsum(sizes)[:-1]]) for sizes in tables]
        return np.concatenate(tables), np.concatenate(begins)

    def rows(
        self, tokens: Int[np.ndarray, "B L"], segments: Int[np.ndarray, "B L"]
    ) -> Int[np.ndarray, "B L A"]:
        """Numbers of rows, int32; an n-gram that reaches over a document's start has pads there.

        Source: 2601.07372, equation 2; NgramHashMapping of engram_demo_v1.py.
        Differs: there a row of tokens is one document.
        """
        c, ids = self.config, self.ids[tokens]
        longest = c.orders[-1]
        seen = [ids]
        for back in range(1, longest):
            earlier, same = np.full_like(ids, self.pad), np.zeros(ids.shape, bool)
            earlier[:, back:] = ids[:, :-back]
            same[:, back:] = segments[:, back:] == segments[:, :-back]
            seen.append(np.where(same, earlier, self.pad))
        found = []
        for multipliers in self.multipliers:
            mixed, at = ids * multipliers[0], 1
            for order in c.orders:
                while at < order:
                    mixed = mixed ^ (seen[at] * multipliers[at])
                    at += 1
                found.extend([mixed] * c.heads)
        sizes, begins = self.sizes
        return (np.stack(found, axis=-1) % sizes + begins).astype(np.int32)

    def on_device(self) -> engram.Hash:
        """The same for inside a traced function."""
        sizes, begins = self.sizes
        high, low = ((self.multipliers >> shift).astype(np.uint32) for shift in (32, 0))
        return engram.Hash(
            ids=self.ids.astype(np.int32),
            high=high,
            low=low,
            sizes=sizes.astype(np.uint32),
            begins=begins.astype(np.int32),
            pad=np.array(self.pad, np.int32),
        )

    def carried(self, batch: Batch) -> Batch:
        """The batch with the rows of its tokens."""
        tokens, segments = (np.asarray(x) for x in (batch.tokens, batch.segments))
        return batch._replace(memory=self.rows(tokens, segments))


def addresses(config: engram.Config, tokenizer: Tokenizer | Any) -> Addresses | None:
    """How this model's memories are addressed by this tokenizer's text; None where it has none.

    What lies before a document is its end token, or id 0 where there is none. A product of an id
    and a multiplier stays below 2^63.
    """
    if not config.layers:
        return None
    ids = compressed(tokenizer)
    bound = max(1, np.iinfo(np.int64).max // (int(ids.max()) + 1) // 2)
    multipliers = [
        2 * np.random.default_rng(LAYER * n).integers(0, bound, config.orders[-1], np.int64) + 1
        for n in config.layers
    ]
    return Addresses(config, ids, np.stack(multipliers), int(ids[tokenizer.eos or 0]))
