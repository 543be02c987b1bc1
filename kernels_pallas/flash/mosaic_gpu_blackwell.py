"""Attention on Blackwell's tensor cores: bfloat16, added up in float32 in tensor memory.

A warpgroup has the scores of 128 queries and 64 keys at a time; which keys, what masks them, and
all around the kernels are Hopper's (gpu_plan.py, mosaic_gpu.py). Forward two warpgroups have 128
queries each, whose sum of weighted values is scaled where it lies at every step; the steps are
read for both. The gradients need no scaling: the two take turns in the steps of one tile of 128
queries or keys, and one sum has the products of both.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.blackwell_scores import (
    COLUMN,
    LAYOUT,
    PIECES,
    ROW,
    ROWS,
    SHAPE,
    cut,
    soften,
    unseen,
)
from kernels_pallas.flash import gpu_plan, gpu_scores, mosaic_gpu
from kernels_pallas.flash.blackwell_tiles import over_tiles
from kernels_pallas.flash.gpu_plan import EMPTY, LOG2E, NOTHING, STEP, Plan
from kernels_pallas.flash.table import Table

_F32, _BF16 = jnp.float32, jnp.bfloat16


def _seen(plan: Plan, found, nothing, first, row, ends, own, others, *, by_key=False):
    """Return numbers of a tile's and some of a step's pairs, `nothing` where they do not see each
    other. What tells lies in shared memory; one after the other is read and used.
    """
    layouts = (COLUMN, ROW) if by_key else (ROW, COLUMN)
    may = gpu_scores.in_reach(plan, first, row, plgpu.load(ends, layout=layouts[1]), by_key, SHAPE,
                              LAYOUT)
    found = jnp.where(may, found, nothing)
    if not plan.segmented:
        return found
    own, others = (plgpu.load(x, layout=layout) for x, layout in zip((own, others), layouts,
                                                                     strict=True))
    return jnp.where(gpu_scores.of_one(own, others, by_key, SHAPE), found, nothing)


def _met(plan: Plan, row, first, found, masked, column, own, ends, others):
    """Scores of a piece, NOTHING where a query does not see a key."""
    if not masked:
        return found
    others = cut(others[0], column) if others else None
    return _seen(plan, found, NOTHING, first, row, cut(ends, column), own[0] if own else None,
                 others)


def _by_phase(plan: Plan, at, own, later, state):
    for low, high, masked in mosaic_gpu.phases(plan):
        state = own.each(at.edges[low] - at.low, at.edges[high] - at.low,
                         functools.partial(later, masked), state)
    return state


def forward_tiles(plan: Plan, table: Table, q, k, v, sinks):
    """Return o [B, L, H, V] and lse [B, H, L], to base 2 as the sinks are, which are in it."""
    def products(rows, streamed):
        return [(rows[0], streamed[0])], [streamed[1]]

    def attend(at, row, own, scalars):
        first_gmem, sinks_gmem = scalars

        def later(masked, k, old):
            def part(raw, keep, k_smem, v_smem, ends, *others):
                pieces, top = [], old[0]
                for column in PIECES:
                    found, _ = gpu_scores.scores(plan, raw(0, column))
                    found = _met(plan, row, first_gmem[0], found, masked, column, own.rows[1:],
                                 ends, others)
                    top = jnp.maximum(top, found.max(axis=1))
                    pieces.append(found)
                return soften(own, old, top, pieces, keep, k > 0)

            return own.meet(k, part)

        top, total = _by_phase(plan, at, own, later, unseen(EMPTY))
        sink = sinks_gmem[at.head]
        highest = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - highest)
        total = total * shrink + jnp.exp2(sink - highest)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, highest + jnp.log(total) * LOG2E, NOTHING)

        def scaled(column, width):
            values = own.take(0, column, width)
            return values * hopper.spread(shrink / total, values.shape, 0)

        return scaled, lse

    outs = [jax.ShapeDtypeStruct((*q.shape[:3], plan.V), _BF16),
            jax.ShapeDtypeStruct((plan.B, plan.H, plan.L), _F32)]
    return over_tiles(attend, products, gpu_plan.of_pairs(table.keys),
                      [q, *mosaic_gpu.own_of(plan, table)],
                      [k, v, *mosaic_gpu.others_of(plan, table)], outs, both=True,
                      heads=plan.G, scalars=[table.first, sinks], scores=1, weights=1,
                      sums=[plan.V])


def query_gradient(plan: Plan, table: Table, q, do, lse, delta, k, v):
    """Return dq / scale [B, L, H, D]; lse is to base 2, 1e30 for a row that sees nothing."""
    def products(rows, streamed):
        (q_smem, do_smem), (k_smem, v_smem) = rows[:2], streamed[:2]
        return [(q_smem, k_smem), (do_smem, v_smem)], [k_smem]

    def attend(at, row, own, scalars):
        (first_gmem,) = scalars
        less, delta = (plgpu.load(x, layout=ROW) for x in own.rows[2:4])

        def later(masked, k, _):
            def part(raw, keep, k_smem, v_smem, ends, *others):
                for column in PIECES:
                    found, bent = gpu_scores.scores(plan, raw(0, column))
                    found = _met(plan, row, first_gmem[0], found, masked, column, own.rows[4:],
                                 ends, others)
                    weights = jnp.exp2(found - hopper.spread(less, SHAPE, 0))
                    more = raw(1, column) - hopper.spread(delta, SHAPE, 0)
                    keep(0, column, gpu_scores.gradient(weights, more, bent))

            own.meet(k, part)

        _by_phase(plan, at, own, later, None)
        return [functools.partial(own.take, 0)]

    outs = [jax.ShapeDtypeStruct(q.shape, _BF16)]
    return over_tiles(attend, products, table.keys,
                      [q, do, lse, delta, *mosaic_gpu.own_of(plan, table)],
                      [k, v, *mosaic_gpu.others_of(plan, table)], outs, both=False,
                      heads=plan.G, scalars=[table.first], scores=2, weights=1, sums=[plan.D])[0]


def key_gradients(plan: Plan, table: Table, q, do, lse, delta, k, v):
    """Return dk / scale [B, S, K, D] and dv [B, S, K, V] in bfloat16."""
    arrays = (q, do, lse, delta, k, v)
    if not plan.apart:
        return _key_tiles(plan, table, *arrays, keys=True, values=True)
    return (*_key_tiles(plan, table, *arrays, keys=True),
            *_key_tiles(plan, table, *arrays, values=True))


def _key_tiles(plan: Plan, table: Table, q, do, lse, delta, k, v, *, keys=False, values=False):
    """Return the gradients that are asked for, of a tile of keys by all heads that share them."""
    own, others = mosaic_gpu.own_of(plan, table), mosaic_gpu.others_of(plan, table)
    fixed = [k, v] if keys else [k]  # of the keys' gradient alone the values come second

    def products(rows, streamed):
        q_smem, do_smem = streamed[:2]
        scored = [(rows[0], q_smem), (rows[1], do_smem)] if keys else [(rows[0], q_smem)]
        return scored, [q_smem] * keys + [do_smem] * values

    def attend(at, _, own, scalars):
        (first_gmem,) = scalars
        ends, *others = own.rows[len(fixed):]

        def later(k, _):
            row = (at.low + lax.rem(k, at.span)) * STEP

            def part(raw, keep, q_smem, do_smem, lse_smem, delta_smem, *segments):
                for column in PIECES:
                    found, bent = gpu_scores.scores(plan, raw(0, column))
                    less, delta = (cut(x, column) for x in (lse_smem, delta_smem))
                    less = hopper.spread(plgpu.load(less, layout=COLUMN), SHAPE, 1)
                    weights = _seen(
                        plan, jnp.exp2(found - less), 0.0, first_gmem[0], row + column, ends,
                        cut(segments[0], column) if segments else None,
                        others[0] if others else None, by_key=True)
                    if values:
                        keep(keys, column, weights)
                    if keys:
                        less = hopper.spread(plgpu.load(delta, layout=COLUMN), SHAPE, 1)
                        keep(0, column, gpu_scores.gradient(weights, raw(1, column) - less, bent))

            own.meet(k, part)

        own.each(0, at.span * plan.G, later, None)
        return [functools.partial(own.take, n) for n in range(keys + values)]

    sums = [plan.D] * keys + [plan.V] * values
    outs = [jax.ShapeDtypeStruct((*k.shape[:3], width), _BF16) for width in sums]
    return over_tiles(attend, products, table.queries, [*fixed, *others],
                      [q, do, lse, delta, *own], outs, both=False, turns=plan.G,
                      scalars=[table.first], scores=1 + keys, weights=keys + values, sums=sums)


flash = functools.partial(
    mosaic_gpu.flash,
    kernels=mosaic_gpu.Kernels(forward_tiles, query_gradient, key_gradients, 2 * ROWS))
