"""What the GPU kernels of flash can do, and how they cut a call.

A tile is 128 queries of one head, or 128 keys of one key head in the keys' gradient; it meets steps
of the other side, those that anything in it may see. Which these are is a table of numbers, since
documents and the place of the first query are known only when the kernel runs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.flash import pairs, visits

X, HALF = 128, 64  # rows of a tile, and of one of the two warpgroups that multiply it
STEP = 64  # keys or queries that a tile meets at once, or two of them
WIDEST, WIDEST_VALUE = 192, 128  # DeepSeek's heads of 128 and 64 rotary dims
# A row that sees nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = pairs.MASKED, pairs.EMPTY
LOG2E = math.log2(math.e)
LATER = jnp.iinfo(jnp.int32).max  # where a key ends that nobody may see


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """What masks, filled up to whole tiles, and which steps each tile meets.

    Shapes: first [1], the row of query 0; own [B, L] and others [B, S] segments, never equal where
    one is padding; ends [B, S]; keys [B, L / X, 4], the first key step of a tile of queries, the
    first and the last + 1 that no mask touches, and the last + 1; queries [B, S / X, 2], the first
    query step of a tile of keys and the last + 1.
    """

    first: Any
    own: Any
    others: Any
    ends: Any
    keys: Any
    queries: Any


def table_of(plan: Plan, marks: pairs.Marks) -> Table:
    """Return the table of a call."""
    at, B, i32 = plan.position, plan.B, jnp.int32
    start = jnp.zeros((), i32) if marks.first is None else marks.first
    tiles, steps = plan.L // X, plan.S // STEP

    def filled(x, length, fill):
        return jnp.pad(x.astype(i32), ((0, 0), (0, length - x.shape[1])), constant_values=fill)

    ends = jnp.arange(at.S, dtype=i32) * at.stride + (at.span - 1)
    ends = jnp.broadcast_to(ends, (B, at.S)) if marks.ends is None else marks.ends
    ends = filled(ends, plan.S, LATER)
    seen = jnp.ones((B, tiles, steps), bool)
    if plan.segmented:
        own, others = filled(marks.segments_q, plan.L, 0), filled(marks.segments_k, plan.S, -1)
        spans = []
        for x, size in ((own, X), (others, STEP)):
            x = x.reshape(B, -1, size)
            known = x > 0
            spans.append((jnp.where(known, x, LATER).min(2), jnp.where(known, x, 0).max(2)))
        (low, high), (least, most) = spans
        # segments of the two may meet
        seen = (low[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= high[:, :, None])
        own = jnp.where(own == 0, -2, own)
    else:
        own, others = jnp.zeros((B, plan.L), i32), jnp.zeros((B, plan.S), i32)
    latest = None
    if marks.ends is not None and at.window is not None:
        known = jnp.where(ends == LATER, -1, ends)
        latest = known.reshape(B, steps, STEP).max((0, 2))
    edges = jax.vmap(lambda i: _edges(at, i, latest, start))(jnp.arange(tiles, dtype=i32))
    low, inside_low, inside_high, high = (x[None] for x in edges)
    step = jnp.arange(steps, dtype=i32)[None, None]
    seen &= (step >= low[..., None]) & (step < high[..., None])
    if plan.L >= at.L + X:  # the last tile is all padding
        seen &= jnp.arange(tiles, dtype=i32)[None, :, None] * X < at.L
    first_step, last_step = _bounds(seen, 2)
    if plan.marked:
        inside_low = inside_high = last_step
    inside = [jnp.clip(x, first_step, last_step) for x in (inside_low, inside_high)]
    keys = jnp.stack([first_step, *inside, last_step], -1)
    # a tile of keys is two steps of them, and a tile of queries two steps of those
    both = seen.reshape(B, tiles, -1, X // STEP).any(3)
    queries = jnp.stack(_bounds(both, 1), -1) * (X // STEP)
    return Table((at.offset + start).reshape(1), own, others, ends, keys, queries)


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


def _edges(at: pairs.Plan, i, latest, start):
    """First key step of query tile i, the first and last + 1 that is seen whole, the last + 1."""
    (low, inside_low, _), (_, inside_high, _), (_, high, _) = visits.ranges(
        at, i, latest_M=latest, start=start)
    return tuple(jnp.asarray(x, jnp.int32) for x in (low, inside_low, inside_high, high))


def _bounds(seen, dim):
    """The first place of a dim where something is seen and the last + 1; 0 and 0 for none."""
    size = seen.shape[dim]
    first = jnp.argmax(seen, dim).astype(jnp.int32)
    last = size - jnp.argmax(jnp.flip(seen, dim), dim).astype(jnp.int32)
    some = seen.any(dim)
    return jnp.where(some, first, 0), jnp.where(some, last, 0)
