"""What the Hopper kernels of token_sparse can do, and how they cut a call.

Letters beside the house's: Z tiles of two queries, 64 rows each, of which heads are the first.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kernels_pallas import device

HALF = 64  # rows of a query, and tokens of it multiplied at once
WIDEST = 128  # of what one warpgroup's registers hold beside the scores
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

    @property
    def D(self) -> int:
        """Width in memory: whole rows of 128 bytes."""
        return _whole(self.Dk, 64)

    @property
    def steps(self) -> int:
        """Parts of 64 tokens of a list."""
        return -(-self.N // HALF)

    @property
    def tiles(self) -> int:
        """Tiles of a chunk."""
        return -(-self.chunk // 2)

    @property
    def kept(self) -> int:
        """Rows of a query that are written: the heads, in whole tiles of shared memory."""
        return _whole(self.H, 8)


def plan_of(q, kv, chosen, *, v_dim, scale) -> Plan:
    """Return the plan of a call."""
    (B, L, H, Dk), S, N = q.shape, kv.shape[1], chosen.shape[2]
    chunks = max(-(-B * L * _whole(N, HALF) // GATHERED), 1)
    return Plan(float(scale), v_dim, B, L, S, H, N, Dk, -(-B * L // chunks))


def supports(q, kv, chosen, *, v_dim, scale, unique=False, return_lse=False) -> str | None:
    """Return None, or why the Hopper kernels cannot run this call."""
    del kv, chosen, v_dim, unique, return_lse
    reason = device.lacks_hopper()
    if reason is not None:
        return reason
    if q.dtype != jnp.bfloat16:
        return f"needs bfloat16, q is {q.dtype}"
    if q.shape[3] > WIDEST:
        return f"needs widths up to {WIDEST}, Dk is {q.shape[3]}"
    if q.shape[2] > HALF:
        return f"needs at most {HALF} heads, there are {q.shape[2]}"
    if not scale >= 0:
        return f"needs a scale of 0 or more, scale is {scale}"
    return None


def supports_mass(q, kv, chosen, lse, *, scale) -> str | None:
    """Return None, or why they cannot run token_mass."""
    del lse
    return supports(q, kv, chosen, v_dim=1, scale=scale)
