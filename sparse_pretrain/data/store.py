"""A corpus split as token arrays on disk: tokenised once, mapped into memory after that."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparse_pretrain.data import files

if TYPE_CHECKING:
    from sparse_pretrain.data.corpus import Document
    from sparse_pretrain.data.tokenize import Tokenizer

VERSION = 1  # raise it when the arrays' meaning changes
CHUNK_BYTES = 4_000_000  # text tokenised at a time: enough to keep all cores busy


class Store(NamedTuple):
    """The tokens of a list of documents, end to end.

    With an eos every document is [eos] + its tokens and one more eos closes the last, so the token
    after any token is its target; without one the documents simply follow one another. Documents
    without tokens are left out.

    Shapes: tokens [T + 1] or, without an eos, [T]; widths like tokens; starts [documents + 1],
    where the last is T; domains [documents].
    Units: widths are UTF-8 bytes of text per token, 0 for eos.
    """

    tokens: np.ndarray
    widths: np.ndarray
    starts: np.ndarray
    domains: np.ndarray
    eos: int | None

    @property
    def targets(self) -> int:
        """How many tokens have one before them: what one pass over the store predicts."""
        return max(len(self.tokens) - 1, 0)


def from_text(text: str, tokenizer: Tokenizer) -> Store:
    """The store of one document, in memory."""
    ids, widths = tokenizer.spans(text)
    around = [] if tokenizer.eos is None else [tokenizer.eos]
    tokens = np.concatenate([around, ids, around]).astype(np.int32)
    widths = np.concatenate([np.zeros(len(around)), widths, np.zeros(len(around))])
    starts = np.array([0, len(around) + len(ids)], np.int64)
    return Store(tokens, widths.astype(np.int32), starts, np.zeros(1, np.int32), tokenizer.eos)


def open_store(
    documents: Sequence[Document], name: str, tokenizer: Tokenizer, cache: Path
) -> Store:
    """The store called `name` (unique to the documents), made under `cache` if it is not there.

    Written beside its place and moved there whole, so a half-built one is never read, and of
    processes that build at the same time one wins and the others use its.
    """
    folder = cache / "tokens" / f"{name}-{tokenizer.hash}-v{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = files.new_folder(folder.parent, f".{folder.name}.")
        try:
            _write(documents, tokenizer, scratch)
            os.rename(scratch, folder)
        except OSError:
            if not folder.exists():  # a real failure, such as a full disk
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    arrays = {f: np.load(folder / f"{f}.npy") for f in ("starts", "domains")}
    for field, dtype in json.loads((folder / "dtypes.json").read_text()).items():
        path = folder / f"{field}.bin"
        empty = path.stat().st_size == 0  # which cannot be mapped
        arrays[field] = (
            np.zeros(0, dtype) if empty else np.memmap(path, dtype, mode="r").view(np.ndarray)
        )
    return Store(**arrays, eos=tokenizer.eos)


def _write(documents: Iterable[Document], tokenizer: Tokenizer, folder: Path) -> None:
    writer = _Writer(tokenizer)
    dtypes = {"tokens": "uint16" if tokenizer.vocab <= 1 << 16 else "uint32", "widths": "uint16"}
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "widths.bin", "wb") as widths:
        for ids, sizes in writer.parts(documents):
            if len(sizes) and sizes.max() >= 1 << 16:
                raise ValueError(
                    f"data.tokenizer: one token stands for {sizes.max()} bytes; at most 65535"
                )
            tokens.write(ids.astype(dtypes["tokens"]).tobytes())
            widths.write(sizes.astype(dtypes["widths"]).tobytes())
    for field, array in zip(("starts", "domains"), writer.index(), strict=True):
        np.save(folder / f"{field}.npy", array)
    (folder / "dtypes.json").write_text(json.dumps(dtypes))


class _Writer:
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.lengths: list[int] = []
        self.domains: list[int] = []

    def parts(self, documents: Iterable[Document]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Ids and widths to be written one after the other."""
        head = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
        head_ids, head_widths = np.array(head, np.int32), np.zeros(len(head), np.int32)
        for chunk in _chunks(documents):
            spans = self.tokenizer.spans_of([document.text for document in chunk])
            for document, (ids, widths) in zip(chunk, spans, strict=True):
                if len(ids):
                    self.lengths.append(len(head) + len(ids))
                    self.domains.append(document.domain)
                    yield np.concatenate([head_ids, ids]), np.concatenate([head_widths, widths])
        if self.lengths:
            yield head_ids, head_widths

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        return starts, np.array(self.domains, np.int32)


def _chunks(documents: Iterable[Document]) -> Iterable[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
