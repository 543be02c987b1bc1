"""Which steps of the other side a tile of queries or of keys meets, and what masks them.

A table of numbers, which XLA makes, since documents and the place of the first query are known only
when the kernel runs. Its plan is gpu_plan.py's or tpu_plan.py's, in tiles of `position.block_q`
queries and steps of `position.block_k` keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash import pairs, visits

LATER = jnp.iinfo(jnp.int32).max  # where a key ends that nobody may see


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """What masks, filled up to whole tiles, and which steps each tile meets.

    Shapes: first [1], the row of query 0; own [B, L] and others [B, S] segments, never equal where
    one is padding; ends [B, S]; keys [B, tiles, 4], the first key step of a tile of queries, the
    first and the last + 1 that no mask touches, and the last + 1; queries [B, tiles, 2], the first
    query step of a tile of keys and the last + 1. `plan.together` steps are a tile, of keys as of
    queries.
    """

    first: Any
    own: Any
    others: Any
    ends: Any
    keys: Any
    queries: Any


def table_of(plan: Any, marks: pairs.Marks) -> Table:
    """Return the table of a call."""
    at, B, i32 = plan.position, plan.B, jnp.int32
    start = jnp.zeros((), i32) if marks.first is None else marks.first
    X, STEP = at.block_q, at.block_k
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
    together = seen.reshape(B, tiles, -1, plan.together).any(3)
    queries = jnp.stack(_bounds(together, 1), -1) * plan.together
    return Table((at.offset + start).reshape(1), own, others, ends, keys, queries)


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
