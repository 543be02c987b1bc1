"""What the GPU kernels of flash can do, and how they cut a call.

A tile is 128 queries of one head, or 128 keys of one key head in the keys' gradient; it meets steps
of the other side, those that anything in it may see, which table.py tells.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.flash import pairs
from kernels_pallas.flash.table import LATER

X, HALF = 128, 64  # rows of a tile, and of one of the two warpgroups that multiply it
STEP = 64  # keys or queries that a tile meets at once, or two of them
WIDEST, WIDEST_VALUE = 192, 128  # DeepSeek's heads of 128 and 64 rotary dims
# A row that sees nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = pairs.MASKED, pairs.EMPTY
LOG2E = math.log2(math.e)


def whole(n: int, unit: int) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing. `position` is pairs.py's plan, in blocks of X and STEP."""

    position: pairs.Plan
    B: int
    H: int
    K: int
    Dk: int
    Dv: int
    segmented: bool
    marked: bool  # whether a step may be masked that no position masks
    tall: int = X  # queries in memory are a multiple of so many

    @property
    def L(self) -> int:
        """Queries in memory."""
        return whole(self.position.L, self.tall)

    @property
    def S(self) -> int:
        """Keys in memory."""
        return whole(self.position.S, X)

    @property
    def V(self) -> int:
        """Width of values in memory: whole rows of 128 bytes."""
        return whole(self.Dv, 64)

    @property
    def D(self) -> int:
        """Width of keys in memory: results leave by the memory that held queries or keys."""
        return max(whole(self.Dk, 64), self.V)

    @property
    def together(self) -> int:
        """Steps of a tile: of keys as many as of queries."""
        return X // STEP

    @property
    def G(self) -> int:
        """Query heads of a key head."""
        return self.H // self.K

    @property
    def step(self) -> int:
        """Keys or queries that a tile meets at once in Hopper's gradients of queries and keys."""
        # Of a thread's registers 772 bytes were spilled with 192, and with a cap 16 at 128.
        widest = 128 if self.position.softcap is None else 64
        return 2 * STEP if self.D <= widest else STEP

    @property
    def apart(self) -> bool:
        """Whether the gradients of keys and values do not fit into the same registers."""
        return self.D > 64  # at 128, beside a cap, 196 bytes of a thread's were spilled


def supports(q, k, v, **keywords) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    if lacks := generation.lacks_both(q=q):
        return lacks
    for name, x, widest in (("Dk", k, WIDEST), ("Dv", v, WIDEST_VALUE)):
        if x.shape[-1] > widest:
            return f"needs {name} up to {widest}, it is {x.shape[-1]}"
    if 0 in (*q.shape, *v.shape):
        return f"needs queries, keys and widths, q is {q.shape} and v {v.shape}"
    if not keywords["scale"] >= 0:
        return f"needs a scale of 0 or more, scale is {keywords['scale']}"
    return None


def plan_of(q, k, v, marks: pairs.Marks, tall=X, **keywords) -> Plan:
    """Return the plan of a call; `keywords` are those of `pairs.Plan` beside blocks and lengths."""
    (B, L, H, Dk), (S, K), Dv = q.shape, k.shape[1:3], v.shape[-1]
    position = pairs.Plan(block_q=X, block_k=STEP, L=L, S=S, **keywords)
    return Plan(position, B, H, K, Dk, Dv, marks.segments_q is not None, marks.any, tall)


def of_wide(keys):
    """Return Table.keys [B, T, 4] in units of two steps."""
    first, plain, masked, last = (keys[..., i] for i in range(4))
    low, high = first // 2, -(-last // 2)
    plain = jnp.clip(-(-plain // 2), low, high)
    return jnp.stack([low, plain, jnp.clip(masked // 2, plain, high), high], -1)


def of_pairs(keys):
    """Return Table.keys [B, T, 4] of two tiles of queries at a time: [B, T / 2, 4]."""
    first, plain, masked, last = (keys.reshape(keys.shape[0], -1, 2, 4)[..., i] for i in range(4))
    low = jnp.where(last > first, first, LATER).min(2)
    high = last.max(2)
    low = jnp.minimum(low, high)  # 0 where nothing is seen
    plain = jnp.clip(plain.max(2), low, high)
    return jnp.stack([low, plain, jnp.clip(masked.min(2), plain, high), high], -1)
