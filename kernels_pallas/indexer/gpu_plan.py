"""What the GPU kernels of the indexer can do, and how they cut a call.

Rows of a product are keys and its columns the heads of a few queries, so that the sum over a
query's heads goes along a row, where its numbers are in one warp. A program keeps some keys in
memory and lets queries pass. By arithmetic for DeepSeek's 64 heads of 128: a query's heads are
16 KiB and a multiprocessor reads about 24 bytes a cycle from the second-level cache, while it
multiplies them with 128 keys in 256 cycles, so that 512 keys are needed for tensor cores to set the
pace.

Scores go to memory, a part of the queries at a time, and XLA takes the best of them. A running list
in the kernel would have to be in shared memory: the best 2048 of 64 queries, value and number, are
1 MiB of the 227 KiB there are, and Mosaic GPU has neither sorting nor scattering. Writing and
reading a score, 8 bytes, is 2.4 ps of an H100's memory, where DeepSeek's products of it are 17 ps
of its tensor cores.
"""

from __future__ import annotations

import dataclasses
import math

from kernels_pallas import generation

HALF = 64  # keys that a warpgroup multiplies at once
SHARED = 232448 - 1024  # bytes of shared memory, without what barriers need
COLUMNS = 128  # of a product at most
QUERIES = 128  # that meet a program's keys before the next program's turn
WIDEST = 128
SLOTS = 4  # of queries in flight, where they fit
SCORES = 1 << 26  # held at once: 256 MB


def whole(n: int, unit: int) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


@dataclasses.dataclass(frozen=True)
class Scores:
    """Sizes of the kernel of scores."""

    J: int  # heads
    D: int
    S: int  # keys

    @property
    def heads(self) -> int:
        """Columns of a query: of several queries 16 times some number, as Blackwell's products."""
        return whole(self.J, 8 if self.J <= COLUMNS // 2 else 16)

    @property
    def width(self) -> int:
        """Return D in memory: whole rows of 128 bytes."""
        return whole(self.D, 64)

    @property
    def together(self) -> int:
        """Queries of a product: a power of two, so that they divide QUERIES."""
        return 1 << (max(COLUMNS // self.heads, 1).bit_length() - 1)

    @property
    def columns(self) -> int:
        """Columns of a product."""
        return self.together * self.heads

    def slots(self, parts: int) -> int:
        """Return how many of the queries fit in memory beside so many keys."""
        keys = 2 * HALF * parts * (2 * self.width + 8)
        results = 2 * self.together * parts * HALF * 4
        left = SHARED - keys - results
        return min(left // (self.columns * (2 * self.width + 4)), SLOTS)

    @property
    def parts(self) -> int:
        """Times 64 keys of one of the two warpgroups."""
        wanted = max(min(-(-self.S // (2 * HALF)), 4), 1)
        return next(n for n in (4, 2, 1) if n < 2 * wanted and (n == 1 or self.slots(n) >= 2))

    @property
    def keys(self) -> int:
        """Keys of a program."""
        return 2 * HALF * self.parts


def _lacks(q) -> str | None:
    if lacks := generation.lacks_both(q=q):
        return lacks
    if q.shape[3] > WIDEST:
        return f"needs widths up to {WIDEST}, D is {q.shape[3]}"
    return None


def supports_select(q, k, w, **keywords) -> str | None:
    """Return None, or why the kernels cannot score this call."""
    del k, w, keywords
    if lacks := _lacks(q):
        return lacks
    if q.shape[2] > COLUMNS:
        return f"needs up to {COLUMNS} heads, J is {q.shape[2]}"
    return None


def supports_dense(q, k, w, main_q, main_k, main_lse, **keywords) -> str | None:
    """Return None, or why the kernels cannot run index_kl_dense."""
    del k, w, main_lse, keywords
    if lacks := _lacks(q) or generation.lacks_both(main_q=main_q, main_k=main_k):
        return lacks
    if q.shape[2] > HALF:
        return f"needs up to {HALF} heads, J is {q.shape[2]}"
    if 0 in main_q.shape[2:]:
        return f"needs heads and a width of attention, main_q is {main_q.shape}"
    return None


def supports_listed(q, k, w, chosen, mass, *, scale=1.0) -> str | None:
    """Return None, or why the kernels cannot run index_kl_listed."""
    del k, w, chosen, mass, scale
    if lacks := _lacks(q):
        return lacks
    if q.shape[2] > HALF:
        return f"needs up to {HALF} heads, J is {q.shape[2]}"
    return None


def least(parts: int, stride: int, span: int) -> int:
    """Return the row that the first key after so many may be seen from: what callers promise."""
    return parts * stride + span - 1


assert math.log2(QUERIES).is_integer()
