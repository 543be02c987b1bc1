"""Text or synthetic tasks in, batches of packed rows out; `load` is the one way in."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain import spec
from sparse_pretrain.games import mixtures

if TYPE_CHECKING:
    from sparse_pretrain.data.pipeline import Dataset
    from sparse_pretrain.model import engram

PACKS = ("documents", "stream", "random_crop")
TOKENIZERS = "bytes, char, bpe:SIZE or file:PATH"
AHEAD = 2  # batches made ahead of the step; making one takes well under a millisecond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """Where the text comes from and what a batch of it is.

    Units: `seq` tokens per row; `batch` rows per optimizer step over all processes.
    Errors: ValueError naming the field, its value and what it may be.

    `pack` is how documents become rows. `documents`: the documents of an epoch, in a seeded order,
    are laid end to end and cut every `seq` tokens, each its own segment; rows are then shuffled.
    `stream`: the same without segments or document order, for one long text. `random_crop`: every
    row is a crop of the stream at a random place, with replacement, so it never ends and repeats
    text by definition. `mixture` draws rows by domain, with weights that a game may move.
    """

    source: str = "python_stdlib"
    tokenizer: str = "bpe:4096"
    seq: int = 256
    batch: int = 32
    repeat: bool = False
    pack: str = "documents"
    cache: str = ""
    mixture: spec.Config = mixtures.NoConfig()

    def __post_init__(self):
        spec.require(self.seq >= 2, f"seq: a row holds at least 2 tokens, got {self.seq}")
        spec.positive(self, "batch")
        spec.require(self.pack in PACKS, f"pack: {self.pack!r} is none of {', '.join(PACKS)}")
        spec.require(
            re.fullmatch(r"bytes|char|bpe:\d+|file:.+", self.tokenizer) is not None,
            f"tokenizer: {self.tokenizer!r} is not {TOKENIZERS}",
        )
        if self.mixed:
            self._check_mixture()

    def _check_mixture(self) -> None:
        kind, lag = self.mixture.KIND, getattr(self.mixture, "lag", AHEAD + 2)
        ok = self.pack == "documents"
        spec.require(ok, f"mixture.kind: {kind!r} needs pack documents, got {self.pack!r}")
        ok = not self.source.startswith("synthetic:")
        spec.require(ok, f"mixture.kind: {kind!r} needs domains, {self.source!r} has none")
        spec.require(
            lag >= AHEAD + 2,
            f"mixture.lag: must be at least {AHEAD + 2}, since {AHEAD} batches are made ahead and "
            f"a step is told one step late; got {lag}",
        )

    @property
    def mixed(self) -> bool:
        """Whether rows are drawn by domain."""
        return self.mixture.KIND != "none"


def cache_dir(cache: str = "") -> Path:
    """The folder for built corpora, tokenizers and token arrays; empty means the user's own."""
    chosen = cache or os.environ.get("SPARSE_PRETRAIN_CACHE") or "~/.cache/sparse_pretrain"
    return Path(chosen).expanduser()


def vocab(config: Config, *, seed: int) -> int:
    """The vocabulary's size: what the tokenizer's name says, else the data's own.

    Errors: ValueError as of `load`.
    """
    kind, _, arg = config.tokenizer.partition(":")
    if not config.source.startswith("synthetic:"):
        if kind == "bpe":
            return int(arg)
        if kind in ("bytes", "file"):
            from sparse_pretrain.data import tokenize

            with_end = config.pack == "documents"
            made = tokenize.Bytes() if kind == "bytes" else tokenize.read(arg, documents=with_end)
            return made.vocab
    return load(config, seed=seed).vocab


def load(
    config: Config,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    memory: engram.Config | None = None,
) -> Dataset:
    """The dataset that `config` describes, with this process's share of every batch.

    Batches carry the rows that tokens read in the `memory` of a model that has one.

    Errors: ValueError naming the field and the values when a source, a tokenizer or a file is not
    there, or when the batch does not divide over the processes.
    """
    from sparse_pretrain.data import ngrams, pipeline

    found = _load(config, seed, pipeline.Share(process_index, process_count))
    if memory is not None:
        found.addresses = ngrams.addresses(memory, found.tokenizer)
    return found


def _load(config: Config, seed: int, share: Any) -> Dataset:
    from sparse_pretrain.data import pipeline

    if config.source.startswith("synthetic:"):
        from sparse_pretrain.data import synthetic

        return synthetic.build(config, seed=seed, share=share)
    from sparse_pretrain.data.corpus import open_corpus

    cache = cache_dir(config.cache)
    made = pipeline.build(config, open_corpus(config.source, cache), cache, seed=seed, share=share)
    if not config.mixed:
        return made
    from sparse_pretrain.data import mixture

    return mixture.Mixed(made)
