"""Datasets: training batches with an exact cursor, held-out batches, and any text as batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from sparse_pretrain.data import AHEAD, draws, ngrams, store, tokenize
from sparse_pretrain.data.pack import Line
from sparse_pretrain.shapes import Batch

if TYPE_CHECKING:
    from sparse_pretrain.data import Config
    from sparse_pretrain.data.corpus import Corpus

ENDLESS = 1 << 62  # targets in an epoch of a source that has no end
# What a draw is for, so that no two uses of one seed share bits.
DOCUMENTS, ROWS, CROPS, HELDOUT, DOMAINS = range(5)


@dataclasses.dataclass(frozen=True)
class Share:
    """Process `index` of `count`: it makes rows [index * B / count, (index + 1) * B / count)."""

    index: int = 0
    count: int = 1

    def of(self, batch: int) -> tuple[int, int]:
        """First row and number of rows of this process.

        Errors: ValueError with both numbers when the batch does not divide.
        """
        if not 0 <= self.index < self.count:
            raise ValueError(f"process_index: {self.index} is not below {self.count} processes")
        if batch % self.count:
            raise ValueError(f"data.batch: {batch} rows do not divide over {self.count} processes")
        size = batch // self.count
        return self.index * size, size


class Dataset:
    """What training and evaluation read; `TextDataset` and the synthetic tasks fill it in.

    Every training row has a number, counted from 0 over all epochs and processes, and is a function
    of (seed, number). A batch is the next `config.batch` numbers and a process makes its share of
    them, so the batches do not depend on how many processes there are.

    Units: `train_tokens` targets in one epoch (2^62 where there is no end).
    """

    config: Config
    seed: int
    tokenizer: tokenize.Tokenizer
    domains: tuple[str, ...]
    manifest: dict[str, Any]
    train_tokens: int
    addresses: ngrams.Addresses | None = None  # of the model's memories, where it has any

    def __init__(self, config: Config, *, seed: int, share: Share):
        if seed < 0:
            raise ValueError(f"seed: must not be negative, got {seed}")
        self.config, self.seed, self.share = config, seed, share
        self._start, self.local_batch = share.of(config.batch)

    @property
    def vocab(self) -> int:
        """Ids run from 0 to this number, exclusive."""
        return self.tokenizer.vocab

    @property
    def batches(self) -> int | None:
        """How many batches `train` gives before it stops, the last one padded; None for no end."""
        rows = self.total_rows()
        return None if rows is None else -(-rows // self.config.batch)

    def total_rows(self) -> int | None:
        """Training rows before the data ends, None when it never does."""
        raise NotImplementedError

    def train_rows(self, numbers: np.ndarray) -> Batch:
        """The training rows of these numbers; numbers past the end give padding."""
        raise NotImplementedError

    def heldout(self, limit_tokens: int | None = None) -> Iterator[Batch]:
        """The held-out split once, always the same; the last batch is padded.

        With a limit, about that many targets, rounded up to whole rows, from all over the split.
        """
        raise NotImplementedError

    def carried(self, batch: Batch) -> Batch:
        """The batch with the rows that its tokens read in the model's memories, if it has any."""
        return batch if self.addresses is None else self.addresses.carried(batch)

    def text(self, text: str) -> Iterator[Batch]:
        """A text as batches of the same form; its end carries no weight, its domain is 0.

        Errors: ValueError when there is nothing to predict in it.
        """
        piece = store.from_text(text, self.tokenizer)
        if piece.targets < 1 or not piece.widths[1:].any():
            raise ValueError(f"text: {len(text)} characters hold no token to predict")
        line = self._plain_line(piece)
        return map(self.carried, map(line.batch, self._shares(np.arange(line.rows))))

    def train(self, cursor: dict[str, Any] | None = None) -> TrainIterator:
        """This process's training batches, from the start or a cursor, to the end unless `repeat`.

        Errors: ValueError as `TrainIterator.set_state`.
        """
        found = TrainIterator(self)
        if cursor is not None:
            found.set_state(cursor)
        return found

    def identity(self) -> dict[str, Any]:
        """What a cursor belongs to: the same keys and values, the same rows by number."""
        return {
            "manifest_hash": self.manifest["hash"],
            "tokenizer": self.tokenizer.hash,
            "pack": self.config.pack,
            "seq": self.config.seq,
            "seed": self.seed,
        }

    def _shares(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """This process's row numbers of every batch over `order`, -1 where the last runs out."""
        size = self.config.batch
        order = np.concatenate([order, np.full(-len(order) % size, -1)])
        for begin in range(self._start, len(order), size):
            yield order[begin : begin + self.local_batch]

    def _plain_line(self, part: store.Store) -> Line:
        documents = self.config.pack == "documents"
        return Line(part, self.config.seq, segments=documents, score_eos=False)


class OnlyText(Dataset):
    """A tokenizer and a form of rows, with no corpus behind them: it can only read texts."""

    def __init__(self, config: Config, tokenizer: tokenize.Tokenizer):
        super().__init__(config, seed=0, share=Share())
        self.tokenizer, self.domains, self.manifest = tokenizer, ("text",), {}
        self.train_tokens = 0


class TrainIterator:
    """Training batches of one process, made ahead in a thread, resumable to the bit.

    The cursor is the number of rows handed out (not of those made ahead) over all processes, with
    what it belongs to. It fixes the place in the packed line, also in the middle of a document, and
    holds for any batch size and number of processes.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._from(0)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._rows += self.dataset.config.batch
        return batch

    def get_state(self) -> dict[str, Any]:
        """The cursor, JSON-able."""
        return {"rows": self._rows, **self.dataset.identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on right after the last batch that had been handed out when `state` was taken.

        Errors: ValueError naming the first thing that differs between the cursor's data and this.
        """
        self._check(state)
        self._from(int(state["rows"]))

    def _check(self, state: dict[str, Any]) -> None:
        for name, here in self.dataset.identity().items():
            if state.get(name) != here:
                raise ValueError(f"data.{name}: cursor has {state.get(name)!r}, run has {here!r}")

    def _from(self, rows: int) -> None:
        dataset, size = self.dataset, self.dataset.config.batch
        total = dataset.total_rows()
        left = ENDLESS if total is None else max(total - rows, 0)
        self._rows = rows
        first = rows + dataset._start

        def make(i: int) -> Batch:
            numbers = first + i * size + np.arange(dataset.local_batch)
            return dataset.carried(dataset.train_rows(numbers))

        self._batches = iter(
            grain.MapDataset.range(-(-left // size))
            .map(make)
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD))
        )


class TextDataset(Dataset):
    """A tokenised corpus, packed as `config.pack` says."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        tokenizer: tokenize.Tokenizer,
        cache: Path,
        *,
        seed: int,
        share: Share,
    ):
        super().__init__(config, seed=seed, share=share)
        self.tokenizer = tokenizer
        self.domains = corpus.domains
        self.manifest = corpus.manifest | {
            "tokenizer": config.tokenizer,
            "tokenizer_hash": tokenizer.hash,
            "vocab": tokenizer.vocab,
        }
        key = corpus.manifest["hash"]
        self._train = store.open_store(corpus.train, f"{key}-train", tokenizer, cache)
        self._heldout = store.open_store(corpus.heldout, f"{key}-heldout", tokenizer, cache)
        for split, part in (("training", self._train), ("held-out", self._heldout)):
            if not part.targets:
                raise ValueError(f"data.source: {config.source} has no {split} text")
        self.train_tokens = self._train.targets
        if config.pack == "random_crop" and self.train_tokens < config.seq:
            raise ValueError(
                f"data.seq: a crop of {config.seq} does not fit the {self.train_tokens} targets "
                f"of {config.source}"
            )
        self._documents = np.arange(len(self._train.domains))
        self._line = functools.lru_cache(maxsize=2)(self._make_line)

    def part(self, domain: int, seed: int) -> TextDataset:
        """The training rows of one domain's documents; they may be none."""
        found = copy.copy(self)
        found.seed, found._documents = seed, np.flatnonzero(self._train.domains == domain)
        found.train_tokens = int(np.diff(self._train.starts)[found._documents].sum())
        found._line = functools.lru_cache(maxsize=2)(found._make_line)
        return found

    def total_rows(self) -> int | None:
        if self.config.repeat or self.config.pack == "random_crop":
            return None
        return self._line(0).rows

    def train_rows(self, numbers: np.ndarray) -> Batch:
        if self.config.pack == "random_crop":
            places = self.train_tokens - self.config.seq + 1
            return self._line(0).crops(draws.below(places, self.seed, CROPS, numbers))
        rows = self._line(0).rows  # the same in every epoch
        epochs = numbers // rows if self.config.repeat else np.zeros_like(numbers)
        return _concatenate(
            [
                self._epoch_rows(int(epoch), numbers[epochs == epoch] - epoch * rows)
                for epoch in np.unique(epochs)
            ]
        )

    def heldout(self, limit_tokens: int | None = None) -> Iterator[Batch]:
        line = self._plain_line(self._heldout)
        order = draws.permutation(line.rows, 0, HELDOUT)
        order = limited(order, limit_tokens, self.config.seq)
        return map(self.carried, map(line.batch, self._shares(order)))

    def _make_line(self, epoch: int) -> Line:
        if self.config.pack != "documents":
            return Line(self._train, self.config.seq, segments=False)
        order = draws.permutation(len(self._documents), self.seed, DOCUMENTS, epoch)
        return Line(self._train, self.config.seq, order=self._documents[order])

    def _epoch_rows(self, epoch: int, rows: np.ndarray) -> Batch:
        line = self._line(epoch if self.config.pack == "documents" else 0)
        real = rows < line.rows
        rows = rows.copy()
        rows[real] = draws.shuffled(rows[real], line.rows, self.seed, ROWS, epoch)
        return line.batch(rows)


def build(
    config: Config, corpus: Corpus, cache: Path, *, seed: int, share: Share | None = None
) -> TextDataset:
    """The dataset over a corpus, its tokenizer and token arrays made once under `cache`."""
    share = share or Share()
    share.of(config.batch)  # refuse before the minutes of tokenising
    tokenizer = tokenize.make(config.tokenizer, corpus, cache, documents=config.pack == "documents")
    return TextDataset(config, corpus, tokenizer, cache, seed=seed, share=share)


def limited(order: np.ndarray, limit_tokens: int | None, seq: int) -> np.ndarray:
    """As many of the rows as hold `limit_tokens` targets, all of them without a limit."""
    if limit_tokens is None:
        return order
    if limit_tokens < 1:
        raise ValueError(f"limit_tokens: must be positive, got {limit_tokens}")
    return order[: -(-limit_tokens // seq)]


def _concatenate(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    fields = zip(*(batch.fields for batch in batches), strict=True)
    return Batch(*map(np.concatenate, fields))
