"""What the GPU kernels of token_sparse can do, and how they cut a call.

Letters beside the house's: Z tiles. A tile is two queries, 64 rows each, of which heads are the
first; or, where latents are wider than a warpgroup's registers or heads more than its rows, one
query and 64 of its heads, whose result the two warpgroups share by columns (mosaic_gpu_wide.py).
"""

from __future__ import annotations

import dataclasses
import math

from kernels_pallas import generation

HALF = 64  # rows of a query, and tokens of it multiplied at once
NARROW = 128  # of what one warpgroup's registers hold beside the scores
# Of what two hold, and of what shared memory holds of queries, tokens and gradients at once:
# DeepSeek's latent of 512 and 64 rotary dims.
WIDEST, WIDEST_VALUE = 576, 512
# A row that lists nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = -1e30, -1e29
LOG2E = math.log2(math.e)
# Tokens gathered at once: bounds the memory of keys and of their gradients by query.
GATHERED = 1 << 19


def _whole(n, unit):
    return -(-n // unit) * unit


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing."""

    scale: float
    v_dim: int
    B: int
    L: int
    S: int
    H: int
    N: int
    Dk: int
    chunk: int  # queries, of all rows of the batch end to end
    blackwell: bool = False

    @property
    def D(self) -> int:
        """Width in memory: whole rows of 128 bytes.

        On Blackwell each of the two warpgroups that share a wide query multiplies half of its first
        512 columns, in multiples of 64; what DeepSeek's latent has beyond them is left to XLA.
        """
        return _whole(self.Dk, 128 if self.blackwell and self.wide and self.Dk <= 512 else 64)

    @property
    def V(self) -> int:
        """Width of values in memory."""
        return _whole(self.v_dim, 128 if self.blackwell and self.wide else 64)

    @property
    def wide(self) -> bool:
        """Whether two warpgroups share a query."""
        return self.Dk > NARROW or self.H > HALF

    @property
    def pair(self) -> int:
        """Queries of a tile."""
        return 1 if self.wide else 2

    @property
    def sets(self) -> int:
        """Sets of 64 heads."""
        return -(-self.H // HALF)

    @property
    def steps(self) -> int:
        """Parts of 64 tokens of a list."""
        return -(-self.N // HALF)

    @property
    def tiles(self) -> int:
        """Tiles of a chunk, of one set of heads."""
        return -(-self.chunk // self.pair)

    @property
    def kept(self) -> int:
        """Rows of a query that are written: the heads, in whole tiles of shared memory."""
        return _whole(self.H, 8) if self.sets == 1 else self.sets * HALF


def plan_of(q, kv, chosen, *, v_dim, scale) -> Plan:
    """Return the plan of a call."""
    (B, L, H, Dk), S, N = q.shape, kv.shape[1], chosen.shape[2]
    chunks = max(-(-B * L * _whole(N, HALF) // GATHERED), 1)
    return Plan(float(scale), v_dim, B, L, S, H, N, Dk, -(-B * L // chunks),
                generation.is_blackwell())


def supports(q, kv, chosen, *, v_dim, scale, unique=False, return_lse=False) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    del kv, chosen, unique, return_lse
    if lacks := generation.lacks_both(q=q):
        return lacks
    if q.shape[3] > WIDEST:
        return f"needs widths up to {WIDEST}, Dk is {q.shape[3]}"
    if v_dim > WIDEST_VALUE:
        return f"needs values of up to {WIDEST_VALUE}, v_dim is {v_dim}"
    if not scale >= 0:
        return f"needs a scale of 0 or more, scale is {scale}"
    return None


def supports_mass(q, kv, chosen, lse, *, scale) -> str | None:
    """Return None, or why they cannot run token_mass."""
    del lse
    return supports(q, kv, chosen, v_dim=1, scale=scale)
