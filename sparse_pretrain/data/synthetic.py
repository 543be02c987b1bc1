"""Tasks with a known answer, made from (seed, number) on the fly: copy, induction, recall, needle.

A source is `synthetic:NAME[:key=value,...]`. A row is as many examples as fit, each its own segment
that starts with id 0, and weights are 1 only where the answer is predicted. Ids: 0 starts an
example, 1 marks, the rest are symbols.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from sparse_pretrain.data import draws
from sparse_pretrain.data.pipeline import ENDLESS, Dataset, Share, limited
from sparse_pretrain.data.tokenize import EOS, Tokenizer
from sparse_pretrain.shapes import Batch

if TYPE_CHECKING:
    from sparse_pretrain.data import Config

START, MARK, FIRST_SYMBOL = 0, 1, 2
TRAIN, HELDOUT, RAMP = range(3)  # part of every draw's key, so the splits share no example's bits
VERSION = 1  # part of the manifest hash: raise it when a task changes


class Examples(NamedTuple):
    """Shapes: line [N, slots + 1], whose token j + 1 is the target of token j; scored [slots]."""

    line: np.ndarray
    scored: np.ndarray


def _copy(a: dict[str, int], key: tuple) -> Examples:
    """x1 .. xk MARK x1 .. xk: the second run is scored."""
    k = a["length"]
    x = FIRST_SYMBOL + draws.below(a["vocab"] - FIRST_SYMBOL, *key, np.arange(k))
    start, mark = _columns(x, START, MARK)
    return Examples(np.concatenate([start, x, mark, x], 1), np.arange(2 * k + 1) > k)


def _induction(a: dict[str, int], key: tuple) -> Examples:
    """Noise with one symbol s, followed by t, in it; ends in s, and t is scored.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads (the pattern [A][B] .. [A]).
    """
    n, symbols = a["length"], a["vocab"] - FIRST_SYMBOL
    s = draws.below(symbols, *key, n)
    # The noise avoids s: drawn from one symbol less, those from s on moved up by one.
    x = draws.below(symbols - 1, *key, np.arange(n))
    x += x >= s
    at = draws.below(n - 1, *key, n + 1)
    np.put_along_axis(x, at, s, 1)
    answer = np.take_along_axis(x, at + 1, 1)
    (start,) = _columns(x, START)
    line = np.concatenate([start, x + FIRST_SYMBOL, s + FIRST_SYMBOL, answer + FIRST_SYMBOL], 1)
    return Examples(line, np.arange(n + 2) == n + 1)


def _recall(a: dict[str, int], key: tuple) -> Examples:
    """k1 v1 .. kP vP MARK, then every key again in another order, each followed by its value.

    With a `length` the pairs lie at random places in that much noise, none in its last `gap`
    tokens, so every answer lies more than `gap` tokens before its question.

    Source: Arora et al. 2023, Zoology (multi-query associative recall).
    Differs: gaps are of noise symbols of their own, and the questions follow one another.
    """
    pairs, n, gap = a["pairs"], a["length"], a["gap"]
    keys, values, noise = _recall_symbols(a)
    k = FIRST_SYMBOL + _distinct(keys, pairs, *key, 0)
    v = FIRST_SYMBOL + keys + draws.below(values, *key, 1, np.arange(pairs))
    again = _distinct(pairs, pairs, *key, 2)
    start, mark = _columns(k, START, MARK)
    shown = np.stack([k, v], 2).reshape(len(k), -1)
    if n:
        first = FIRST_SYMBOL + keys + values
        x = first + draws.below(noise, *key, 3, np.arange(n))
        at = _apart(n - gap, pairs, 2, *key, 4)
        places = np.stack([at, at + 1], 2).reshape(len(k), -1)
        np.put_along_axis(x, places, shown, 1)
        shown = x
    asked = np.stack([np.take_along_axis(k, again, 1), np.take_along_axis(v, again, 1)], 2)
    line = np.concatenate([start, shown, mark, asked.reshape(len(k), -1)], 1)
    question = np.arange(line.shape[1] - 1) - shown.shape[1] - 2
    return Examples(line, (question >= 0) & (question % 2 == 0))


def _needle(a: dict[str, int], key: tuple) -> Examples:
    """Needles `MARK key value` at random places in noise; ends in MARK key, and value is scored.

    The keys of an example differ, and neither keys nor values are among the noise's symbols. Of
    the needles `asked` different ones are asked for, each in a question of its own.

    Source: the needle-in-a-haystack test; RULER (Hsieh et al. 2024) with several keys.
    """
    n, needles, m = a["length"], a["needles"], a["asked"]
    third = (a["vocab"] - FIRST_SYMBOL) // 3
    noise = a["noise"] or a["vocab"] - FIRST_SYMBOL - 2 * third
    k = FIRST_SYMBOL + _distinct(third, needles, *key, 0)
    v = FIRST_SYMBOL + third + draws.below(third, *key, 1, np.arange(needles))
    x = FIRST_SYMBOL + 2 * third + draws.below(noise, *key, 2, np.arange(n))
    at = _apart(n, needles, 3, *key, 3)
    for offset, part in enumerate((np.full_like(k, MARK), k, v)):
        np.put_along_axis(x, at + offset, part, 1)
    if m == 1:
        asked = draws.below(needles, *key, 4, np.zeros(1, np.int64))
    else:
        asked = _distinct(needles, needles, *key, 5)[:, :m]
    (start,) = _columns(x, START)
    marks = np.full_like(asked, MARK)
    keys, values = np.take_along_axis(k, asked, 1), np.take_along_axis(v, asked, 1)
    questions = np.stack([marks, keys, values], 2).reshape(len(x), -1)
    question = np.arange(n + 3 * m) - n - 2
    scored = (question >= 0) & (question % 3 == 0)
    return Examples(np.concatenate([start, x, questions], 1), scored)


def _columns(like: np.ndarray, *ids: int) -> list[np.ndarray]:
    return [np.full((len(like), 1), i, np.int64) for i in ids]


def _distinct(size: int, count: int, *key: object) -> np.ndarray:
    """`count` different numbers of [0, size) per example, in random order."""
    return np.argsort(draws.draw(*key, np.arange(size)), axis=1, kind="stable")[:, :count]


def _apart(size: int, count: int, wide: int, *key: object) -> np.ndarray:
    """`count` places of [0, size) per example, in order, each the first of `wide` free ones.

    Drawing among the places left when each run counts as one, sorted, and moving number i up by
    (wide - 1) i gives every arrangement with the same chance.
    """
    gaps = np.sort(_distinct(size - (wide - 1) * count, count, *key), 1)
    return gaps + (wide - 1) * np.arange(count)


def _recall_symbols(a: dict[str, int]) -> tuple[int, int, int]:
    """Numbers of keys, of values and of noise symbols, which only a `length` needs."""
    symbols = a["vocab"] - FIRST_SYMBOL
    if a["length"]:
        return symbols // 3, symbols // 3, a["noise"] or symbols - 2 * (symbols // 3)
    return symbols // 2, symbols - symbols // 2, 0


class Task(NamedTuple):
    """A maker of examples from (arguments, key), its default arguments and what bounds them.

    `least` gives the smallest value of each argument, given the others.
    """

    make: Callable[[dict[str, int], tuple], Examples]
    defaults: dict[str, int]
    least: Callable[[dict[str, int]], dict[str, int]]


def _shortened(a: dict[str, int]) -> dict[str, int]:
    """The arguments of the examples that training begins with."""
    gap = {"gap": a["gap"] * a["short"] // a["length"]} if "gap" in a else {}
    return a | gap | {"length": a["short"]}


def _long(a: dict[str, int]) -> bool:
    """Whether the pairs of recall lie in noise."""
    return any(a[k] for k in ("length", "gap", "short", "ramp"))


def _least_vocab(a: dict[str, int], keys: int) -> int:
    """Keys, values and noise take a third each, noise what is left over."""
    return FIRST_SYMBOL + 3 * max(keys, a["noise"] - (a["vocab"] - FIRST_SYMBOL) % 3)


def _least_short(a: dict[str, int]) -> dict[str, int]:
    """Room for what a short example shows, where there are any."""
    if not a["ramp"]:
        return {}
    if "pairs" in a:
        gap = a["gap"] * a["short"] // max(a["length"], 1)
        return {"short": 2 * a["pairs"] + gap}
    return {"short": 3 * a["needles"]}


NO_RAMP = {"short": 0, "ramp": 0}
MOST_NOISE = {"noise": 0}  # 0: all symbols that are left
TASKS = {
    "copy": Task(
        _copy,
        {"length": 16, "vocab": 32},
        lambda a: {"length": 1, "vocab": FIRST_SYMBOL + 1},
    ),
    "induction": Task(
        _induction,
        {"length": 32, "vocab": 32},
        lambda a: {"length": 2, "vocab": FIRST_SYMBOL + 2},
    ),
    "recall": Task(
        _recall,
        # length 0: the pairs alone
        {"pairs": 8, "length": 0, "gap": 0, "vocab": 256} | NO_RAMP | MOST_NOISE,
        lambda a: {
            "pairs": 1,
            **_least_short(a),
            "length": max(a["short"], 2 * a["pairs"] + a["gap"]) if _long(a) else 0,
            "vocab": _least_vocab(a, a["pairs"]) if a["length"] else FIRST_SYMBOL + 2 * a["pairs"],
        },
    ),
    "needle": Task(
        _needle,
        # length 0: as long as a row allows
        {"length": 0, "needles": 1, "asked": 1, "vocab": 64} | NO_RAMP | MOST_NOISE,
        lambda a: {
            "asked": 1,
            **_least_short(a),
            "needles": a["asked"],
            "length": max(a["short"], 3 * a["needles"]),
            "vocab": _least_vocab(a, a["needles"]),
        },
    ),
}
HELDOUT_ROWS = 256


class Symbols(Tokenizer):
    """Ids written as decimal numbers between blanks; id 0 is the eos and has no number."""

    is_text = False

    def __init__(self, vocab: int):
        names = {EOS: START} | {str(i): i for i in range(1, vocab)}
        inner = tokenizers.Tokenizer(models.WordLevel(vocab=names, unk_token=EOS))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens([EOS])
        super().__init__(inner, eos=START)

    def spans_of(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        for word in " ".join(texts).split():
            if not (word.isdecimal() and 0 < int(word) < self.vocab):
                raise ValueError(f"text: {word!r} is not a symbol from 1 to {self.vocab - 1}")
        return super().spans_of(texts)

    def encode(self, text: str) -> np.ndarray:
        return self.spans(text)[0]


class Layout(NamedTuple):
    """How rows are filled: arguments, tokens of an example and from one to the next, examples."""

    args: dict[str, int]
    slots: int
    pitch: int
    per_row: int


class SyntheticDataset(Dataset):
    """Endless examples of one task; the held-out rows are `heldout` rows of other draws.

    The first `ramp` rows of training hold examples with a length of `short`, whose starts divide a
    row evenly, so that a phase of shorter rows need cut none of them.

    Units: `bytes` is 1 per scored target, so bits/byte is bits per answer token.
    """

    def __init__(self, config: Config, name: str, args: dict[str, int], seed: int, share: Share):
        super().__init__(config, seed=seed, share=share)
        self.task, self.args = TASKS[name], args
        self.tokenizer = Symbols(args["vocab"])
        self.domains = (name,)
        self.train_tokens = ENDLESS
        self._whole = self._layout(args, even=False)
        self._short = self._layout(_shortened(args), even=True) if args.get("ramp") else None
        words = ",".join(f"{k}={v}" for k, v in sorted(args.items()))
        self.manifest = {
            "hash": hashlib.sha256(f"{name}:{words}:{VERSION}".encode()).hexdigest()[:16],
            "source": f"synthetic:{name}:{words}",
            "domains": {name: {}},
            "tokenizer": "symbols",
            "tokenizer_hash": self.tokenizer.hash,
            "vocab": self.tokenizer.vocab,
        }

    def total_rows(self) -> int | None:
        return None

    def _layout(self, args: dict[str, int], *, even: bool) -> Layout:
        seq = self.config.seq
        slots = len(self.task.make(args, (0, TRAIN, np.zeros((1, 1), np.int64))).scored)
        if slots > seq:
            raise ValueError(
                f"data.seq: {seq} tokens do not hold an example of {self.domains[0]}, "
                f"which takes {slots}"
            )
        per = seq // slots
        if even:
            per = max(n for n in range(1, per + 1) if seq % n == 0)
        return Layout(args, slots, seq // per if even else slots, per)

    def train_rows(self, numbers: np.ndarray) -> Batch:
        rows = self._rows(numbers, (self.seed, TRAIN), self._whole)
        early = numbers < self.args.get("ramp", 0)
        if self._short is None or not early.any():
            return rows
        short = self._rows(numbers, (self.seed, RAMP), self._short)
        pairs = zip(short.fields, rows.fields, strict=True)
        return Batch(*(np.where(early[:, None], a, b) for a, b in pairs))

    def heldout(self, limit_tokens: int | None = None) -> Iterator[Batch]:
        order = limited(np.arange(self.args["heldout"]), limit_tokens, self.config.seq)
        for numbers in self._shares(order):
            yield self.carried(self._rows(numbers, (0, HELDOUT), self._whole))

    def _rows(self, numbers: np.ndarray, key: tuple[int, int], layout: Layout) -> Batch:
        B, L = len(numbers), self.config.seq
        args, n, pitch, per = layout
        example = (numbers[:, None] * per + np.arange(per)).reshape(-1, 1)
        made = self.task.make(args, (*key, example))
        real = np.repeat(numbers >= 0, per)[:, None]

        def rows_of(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
            out: np.ndarray = np.zeros((B, L), dtype)
            values = np.where(real, np.broadcast_to(values, (B * per, n)), 0)
            places = out[:, : per * pitch].reshape(B * per, pitch) if B else out
            places[:, :n] = values
            out[:, : per * pitch] = places.reshape(B, per * pitch)
            return out

        return Batch(
            tokens=rows_of(made.line[:, :-1]),
            targets=rows_of(made.line[:, 1:]),
            segments=rows_of(np.tile(np.arange(1, per + 1), B)[:, None]),
            positions=rows_of(np.arange(n)),
            weights=rows_of(made.scored, np.float32),
            bytes=rows_of(made.scored),
            domains=np.zeros((B, L), np.int32),
        )


def build(config: Config, *, seed: int, share: Share | None = None) -> SyntheticDataset:
    """The dataset of a `synthetic:NAME[:key=value,...]` source.

    Arguments: `vocab` counts all ids; `heldout` is a number of rows; copy and induction take a
    `length`, recall `pairs` and perhaps a `length` and a `gap`, needle a `length` (0: the row),
    `needles` and how many are `asked`.
    Errors: ValueError naming the task, the argument and the values it may have.
    """
    _, _, rest = config.source.partition(":")
    name, _, words = rest.partition(":")
    if name not in TASKS:
        raise ValueError(f"data.source: {config.source!r}; synthetic tasks are {', '.join(TASKS)}")
    task = TASKS[name]
    args = task.defaults | {"heldout": HELDOUT_ROWS}
    for word in filter(None, words.split(",")):
        key, _, value = word.partition("=")
        if key not in args or not value.isdecimal():
            raise ValueError(
                f"data.source: {word!r} in {config.source!r} is not KEY=NUMBER with a key of "
                f"{', '.join(args)}"
            )
        args[key] = int(value)
    if name == "needle" and not args["length"]:
        args["length"] = max(config.seq - 3 * args["asked"], 0)
    for key, least in {**task.least(args), "heldout": 1}.items():
        if args[key] < least:
            raise ValueError(
                f"data.source: {config.source!r} has {key}={args[key]}; it takes at least {least}"
            )
    return SyntheticDataset(config, name, args, seed, share or Share())
