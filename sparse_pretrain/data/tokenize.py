"""Tokenizers: bytes, characters, byte-level BPE trained on the corpus, or any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sparse_pretrain.data import files

if TYPE_CHECKING:
    from sparse_pretrain.data.corpus import Corpus

EOS = "<|endoftext|>"
# What files call the token between documents, when no tokenizer_config.json beside them says.
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>", "[SEP]")
# GPT-4's word pattern, but a line break keeps the indentation that follows it (all of it except
# the blank that belongs to the next word). On the Python library at 4096 tokens: 3.90 bytes per
# token, against 3.65 without that change and 3.57 with GPT-2's pattern; English is unaffected.
WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++(?:[\r\n]+(?: *(?= ))?)?|\s*[\r\n]+ *(?= )|\s*[\r\n]|\s+(?!\S)|\s+"
)
# A 4096-token vocabulary has long converged on this much text; more only costs time and memory.
BPE_TRAIN_BYTES = 100_000_000


class Tokenizer:
    """Text to token ids and back, with the bytes of text behind every token.

    `vocab` is one more than the largest id; `eos` separates documents (None: there is no such
    token); `hash` changes whenever any text could be encoded differently. Special tokens written
    out in a text are encoded as the text they are.
    """

    is_text = True  # whether any text can be encoded; False for the symbols of a synthetic task

    def __init__(self, inner: tokenizers.Tokenizer, eos: int | None):
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self.inner = inner
        self.eos = eos
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab = max(vocabulary.values()) + 1
        self.hash = hashlib.sha256(f"{eos} {inner.to_str()}".encode()).hexdigest()[:16]
        self._widths = _byte_level_widths(inner, vocabulary, self.vocab)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32, without any special token."""
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of `ids`; special tokens vanish, broken UTF-8 becomes U+FFFD."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and the UTF-8 bytes of `text` each stands for; the bytes sum to the text's.

        A byte-level vocabulary says exactly which bytes a token holds, also where a character is
        split over tokens. Otherwise a token is charged from where the one before it ended, so what
        normalisation dropped goes to the next token, or to the last.

        Units: bytes.
        Differs: a text of which the tokenizer leaves nothing has no token to hold its bytes.
        """
        return self.spans_of([text])[0]

    def spans_of(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`spans` of many texts, on all cores."""
        texts = list(texts)
        encodings = None
        if self._widths is not None:
            encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        spans = []
        for i, text in enumerate(texts):
            size = len(text.encode())
            if encodings is not None and self._widths is not None:
                ids = np.array(encodings[i].ids, np.int32)
                widths = self._widths[ids]
                if widths.sum() == size:  # not so when the file also normalises or adds a prefix
                    spans.append((ids, widths))
                    continue
            encoding = self.inner.encode(text, add_special_tokens=False)
            ids = np.array(encoding.ids, np.int32)
            spans.append((ids, _offset_widths(text, encoding.offsets)))
        return spans

    def save(self, path: str | os.PathLike) -> None:
        """Write a `tokenizer.json` that `read` (and Hugging Face) gives the same ids from."""
        files.write_atomic(Path(path), self.inner.to_str())


class Bytes(Tokenizer):
    """Ids are the UTF-8 bytes themselves; `eos` is 256."""

    def __init__(self):
        vocabulary = {c: b for b, c in enumerate(byte_alphabet())}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([EOS])
        super().__init__(inner, eos=256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def spans_of(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        ids = [self.encode(text) for text in texts]
        return [(i, np.ones(len(i), np.int32)) for i in ids]


class Chars(Tokenizer):
    """Ids number the characters of an alphabet in code-point order; `eos`, if any, comes after.

    Errors: ValueError naming a character that the alphabet lacks.
    """

    def __init__(self, alphabet: Iterable[str], *, eos: bool):
        letters = sorted(set(alphabet))
        inner = tokenizers.Tokenizer(
            models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
        )
        inner.decoder = decoders.Fuse()
        if eos:
            inner.add_special_tokens([EOS])
        super().__init__(inner, eos=len(letters) if eos else None)
        self._letters = letters
        self._points = np.array([ord(c) for c in letters], np.uint32)

    def encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if len(unknown):
            raise ValueError(
                f"data.tokenizer: char knows {len(self._points)} characters, not "
                f"{text[int(unknown[0])]!r}"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        return "".join(self._letters[int(i)] for i in ids if i < len(self._letters))

    def spans_of(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.encode(text), _utf8_widths(_code_points(text))) for text in texts]


def make(spec: str, corpus: Corpus, cache: Path, *, documents: bool = True) -> Tokenizer:
    """The tokenizer that `spec` names, trained on the corpus's train split where it needs one.

    With `documents` it has an `eos`, added as one more id to a file or alphabet without one. The
    alphabet of `char` is that of both splits, as in nanoGPT.

    Errors: ValueError for an unknown spec, a size below 257, a missing or unreadable file.
    """
    kind, _, arg = spec.partition(":")
    if kind == "bytes" and not arg:
        return Bytes()
    if kind == "char" and not arg:
        return Chars(_alphabet(corpus, cache), eos=documents)
    if kind == "bpe" and arg.isdecimal():
        return _bpe(int(arg), corpus, cache)
    if kind == "file" and arg:
        return read(arg, documents=documents)
    raise ValueError(f"data.tokenizer: {spec!r} is not bytes, char, bpe:SIZE or file:PATH")


def read(path: str | os.PathLike, *, documents: bool = False) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`; with `documents`, an eos is added where none is found.

    Errors: ValueError naming the file when it is missing or no tokenizer.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else type(e).__name__
        raise ValueError(f"data.tokenizer: cannot read {path}: {reason}") from None
    try:
        inner = tokenizers.Tokenizer.from_str(text)
        model = json.loads(text)["model"]
    except Exception as e:  # tokenizers raises bare Exception
        reason = str(e).splitlines()[0][:200]
        raise ValueError(f"data.tokenizer: {path} is no tokenizer.json: {reason}") from None
    if not inner.get_vocab_size():
        raise ValueError(f"data.tokenizer: {path} has an empty vocabulary")
    eos = _find_eos(inner, path)
    if model.get("type") == "BPE" and not model.get("merges"):
        plain = _plain(inner, documents)
        if plain is not None:
            return plain
    if eos is None and documents:
        inner.add_special_tokens([EOS])
        eos = inner.token_to_id(EOS)
    return Tokenizer(inner, eos)


def byte_alphabet() -> list[str]:
    """The printable character that byte-level vocabularies write for each of the 256 bytes.

    Source: GPT-2, `bytes_to_unicode`.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _bpe(size: int, corpus: Corpus, cache: Path) -> Tokenizer:
    if size < 257:
        raise ValueError(f"data.tokenizer: bpe:{size} is below 257, the bytes and {EOS}")
    recipe = hashlib.sha256(f"{WORDS} {BPE_TRAIN_BYTES}".encode()).hexdigest()[:8]
    path = cache / "tokenizers" / f"{corpus.manifest['hash']}-bpe{size}-{recipe}.json"
    if path.exists():
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), eos=0)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_sample(corpus), trainer)
    files.write_atomic(path, inner.to_str())
    return Tokenizer(inner, eos=0)


def _alphabet(corpus: Corpus, cache: Path) -> str:
    path = cache / "tokenizers" / f"{corpus.manifest['hash']}-char.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    letters: set[str] = set()
    for split in (corpus.train, corpus.heldout):
        for document in split:
            letters.update(document.text)
    files.write_atomic(path, json.dumps("".join(sorted(letters))))
    return "".join(sorted(letters))


def _sample(corpus: Corpus) -> Iterable[str]:
    """Every k-th training document, k such that about BPE_TRAIN_BYTES are read."""
    sizes = [d.get("train_bytes", 0) for d in corpus.manifest.get("domains", {}).values()]
    stride = max(1, -(-sum(sizes) // BPE_TRAIN_BYTES))
    return (corpus.train[i].text for i in range(0, len(corpus.train), stride))


def _find_eos(inner: tokenizers.Tokenizer, path: Path) -> int | None:
    names: list[Any] = []
    try:
        settings = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        name = settings.get("eos_token")
        names.append(name.get("content") if isinstance(name, dict) else name)
    except (OSError, ValueError, AttributeError):
        pass  # the file beside it is a courtesy, not a requirement
    for name in (*names, *EOS_NAMES):
        if isinstance(name, str) and inner.token_to_id(name) is not None:
            return inner.token_to_id(name)
    return None


def _plain(inner: tokenizers.Tokenizer, documents: bool) -> Tokenizer | None:
    """The `Bytes` or `Chars` that wrote this file, if one did; they are much faster."""
    if inner.to_str() == Bytes().inner.to_str():
        return Bytes()
    letters = set(inner.get_vocab(with_added_tokens=True)) - {EOS}
    if not letters or any(len(c) != 1 for c in letters):
        return None
    eos = inner.token_to_id(EOS) is not None
    if inner.to_str() != Chars(letters, eos=eos).inner.to_str():
        return None
    return Chars(letters, eos=eos or documents)


def _byte_level_widths(
    inner: tokenizers.Tokenizer, vocabulary: dict[str, int], size: int
) -> np.ndarray | None:
    """Bytes per id of a byte-level vocabulary, None for any other."""
    steps = json.loads(inner.to_str()).get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    alphabet = set(byte_alphabet())
    widths = np.zeros(size, np.int32)
    for token, i in vocabulary.items():
        widths[i] = len(token) if alphabet.issuperset(token) else len(token.encode())
    return widths


def _offset_widths(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes from the end of the token before to the end of each token, by character offsets."""
    if not offsets:
        return np.zeros(0, np.int32)
    bytes_before = np.concatenate([[0], np.cumsum(_utf8_widths(_code_points(text)))])
    ends = np.maximum.accumulate(bytes_before[np.array([end for _, end in offsets])])
    ends[-1] = bytes_before[-1]
    return np.diff(ends, prepend=0).astype(np.int32)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _utf8_widths(points: np.ndarray) -> np.ndarray:
    widths = np.ones(len(points), np.int32)
    for limit in (0x80, 0x800, 0x10000):
        widths += points >= limit
    return widths
