"""What the GPU kernels of cross-entropy can do, and how they cut a call.

The softmax is taken of tiles of logits, in Hopper's registers or Blackwell's tensor memory.
Forward, three numbers leave a tile of 256 logits: its largest, the sum of exponentials, and the
target's logit. Backward, the logits are computed again and their gradients written once in
bfloat16, for some of the tokens or some of the vocabulary at a time, and both gradients are plain
products of them. One of the two is complete with each part, the other is summed over the parts in
float32: where there are fewer tokens than entries, which goes for all large vocabularies, that is
the tokens' gradient. To keep these out of memory too, registers would have to hold 64 rows of a
gradient as wide as the model: 256 columns fit, so that at a width of 2048 the logits would be
computed eight times for each of the two gradients, where writing a gradient of a logit and reading
it twice is 6 bytes, or 1.8 ps of an H100's memory, beside 4.1 ps for each of its products.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.grouped_matmul import tiles as grouped

TILE_M, TILE_K = 128, 64
_BARRIERS = 2048  # bytes of shared memory kept for them
LOG2E = math.log2(math.e)
NOTHING = -1e30  # a logit beyond the vocabulary
# Tokens or entries whose logits' gradients are held at once, for each of the width, and at least:
# they then take the memory of the other side's gradient in float32, which every part reads and
# writes, 4 more bytes for a logit.
AT_ONCE, LEAST = 2, 256


def whole(n: int, unit: int) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing."""

    T: int  # whole tiles
    D: int
    V: int  # entries of the vocabulary, without what fills up
    z_loss: float
    softcap: float | None
    layout: str

    @property
    def columns(self) -> int:
        """Entries of the vocabulary in memory: whole rows of 128 bytes, as the copy engine cuts
        arrays (Mosaic GPU compiles no other ones)."""
        return whole(self.V, grouped.COLUMNS)

    @property
    def n(self) -> int:
        """Entries of a tile."""
        return 256 if self.V > 128 else 128

    @property
    def n_tiles(self) -> int:
        """Tiles of the vocabulary."""
        return -(-self.V // self.n)

    @property
    def steps(self) -> int:
        """Stages of a tile's product."""
        return self.D // TILE_K

    @property
    def stages(self) -> int:
        """Stages of the ring that fit."""
        results = 2 * 64 * grouped.COLUMNS * 2
        left = grouped.SHARED - _BARRIERS - results
        return min(left // (2 * TILE_K * (TILE_M + self.n)), 8)

    @property
    def by_entries(self) -> bool:
        """Whether a part is some of the vocabulary, and not some of the tokens."""
        return self.T < self.V

    @property
    def chunk(self) -> int:
        """Tokens or entries whose gradients of logits are held at once: whole tiles."""
        length, unit = (self.V, self.n) if self.by_entries else (self.T, TILE_M)
        most = max(AT_ONCE * self.D, LEAST)
        return whole(-(-length // -(-length // most)), unit)


def capped(plan: Plan, logits):
    """Bend the logits: cap tanh(logits / cap)."""
    if plan.softcap is None:
        return logits
    # the chip's own tanh has 11 bits, its exponential 22
    power = jnp.exp2(logits * (2 * LOG2E / plan.softcap))
    return plan.softcap - (2 * plan.softcap) / (power + 1)


def supports(x, head, targets, weights, **keywords) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    del targets, weights, keywords
    lacks = generation.lacks_both(x=x) or generation.lacks_both("bfloat16", "float32", head=head)
    if lacks:
        return lacks
    if 0 in (*x.shape, head.size):
        return f"needs tokens, a width and a vocabulary, x is {x.shape} and head {head.shape}"
    return None
