"""Rows cut from documents laid end to end, each found from its number alone.

The inputs of a document are [eos] + its tokens and its targets its tokens + [eos], so a document of
n tokens takes n + 1 slots, its first input is eos, and every token is a target exactly once. The
slots of all documents, in the order given, form one line that is cut every `seq` slots. A document
that crosses a cut goes on in the next row as a segment of its own, with positions from 0, its first
input being the last target of the row before. Only the end of the last row is padding. Because a
row is a function of its number, no carry has to be kept: number r starts at slot r * seq, and the
document and offset there follow by bisection.
"""

from __future__ import annotations

import numpy as np

from sparse_pretrain.data.store import Store
from sparse_pretrain.shapes import Batch


class Line:
    """The slots of a store's documents in a given order, all or some, cut into rows of `seq`.

    Some of them need an eos: it is the last target of each, whatever follows in the store.

    With `segments` False documents are not told apart: each row is one segment with positions
    0 .. seq - 1. With `score_eos` False the end of a document carries no weight. Without an eos
    the last token of a document predicts the next one's first, and that target is counted to the
    domain of the document it follows.

    Units: `slots` targets; `rows` rows.
    """

    def __init__(
        self,
        store: Store,
        seq: int,
        *,
        order: np.ndarray | None = None,
        segments: bool = True,
        score_eos: bool = True,
    ):
        self.store, self.seq, self.segments, self.score_eos = store, seq, segments, score_eos
        self.order = np.arange(len(store.domains)) if order is None else order
        lengths = np.diff(store.starts)[self.order]
        # Without an eos the very last token has no target, so the last document is one slot short.
        self.slots = min(int(lengths.sum()), store.targets)
        self._ends = np.minimum(np.cumsum(lengths), self.slots)
        self._begins = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self.rows = -(-self.slots // seq)

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers; numbers outside [0, `rows`) give rows of padding."""
        first_B = np.where((rows >= 0) & (rows < self.rows), rows * self.seq, self.slots)
        return self.crops(first_B)

    def crops(self, first_B: np.ndarray) -> Batch:
        """Rows that start at these slots, which need not be multiples of `seq`."""
        B, L = len(first_B), self.seq
        last_B = np.minimum(first_B + L, self.slots)
        length_B = np.maximum(last_B - first_B, 0)
        # The documents of each row, as one flat list of pieces.
        low_B = np.searchsorted(self._ends, first_B, side="right")
        high_B = np.searchsorted(self._ends, last_B - 1, side="right")
        pieces_B = np.where(length_B > 0, high_B - low_B + 1, 0)
        row = np.repeat(np.arange(B), pieces_B)
        within = np.arange(len(row)) - np.repeat(np.cumsum(pieces_B) - pieces_B, pieces_B)
        place = low_B[row] + within
        begin = np.maximum(self._begins[place], first_B[row])
        size = np.minimum(self._ends[place], last_B[row]) - begin
        document = self.order[place]
        # From pieces to slots.
        position = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        source = np.repeat(self.store.starts[document] + begin - self._begins[place], size)
        source += position
        filled = np.arange(L) < length_B[:, None]
        targets = self.store.tokens[source + 1]
        weights = np.ones(len(source), np.float32)
        if not self.score_eos and self.store.eos is not None:
            weights[targets == self.store.eos] = 0
        if self.segments:
            segments = np.repeat(within + 1, size)
        else:
            segments, position = np.ones(len(source)), np.nonzero(filled)[1]

        def rows_of(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
            if len(values) == B * L:
                return values.astype(dtype).reshape(B, L)
            out: np.ndarray = np.zeros((B, L), dtype)
            out[filled] = values
            return out

        return Batch(
            tokens=rows_of(self.store.tokens[source]),
            targets=rows_of(targets),
            segments=rows_of(segments),
            positions=rows_of(position),
            weights=rows_of(weights, np.float32),
            bytes=rows_of(self.store.widths[source + 1]),
            domains=rows_of(np.repeat(self.store.domains[document], size)),
        )
