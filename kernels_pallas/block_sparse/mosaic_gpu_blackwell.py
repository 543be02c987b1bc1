"""Attention to chosen blocks on Blackwell's tensor cores: bfloat16, added up in tensor memory.

Tiles, and all around the kernels, are Hopper's (by_block.py, mosaic_gpu.py); how a program goes
through them is in `kernels_pallas/blackwell_attention.py`. Forward the two computing warpgroups
have a tile each, with keys of their own. In the gradients they take turns in the steps of one tile
of queries or of keys, 64 at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell_attention, blackwell_scores, hopper
from kernels_pallas.blackwell_attention import Tile
from kernels_pallas.blackwell_scores import COLUMN, PIECES, ROW, ROWS, SHAPE, STEP, cut
from kernels_pallas.block_sparse import by_block, mosaic_gpu, mosaic_gpu_bwd
from kernels_pallas.block_sparse.plan import EMPTY, LOG2E, Plan
from kernels_pallas.hopper import i32

_F32, _BF16 = jnp.float32, jnp.bfloat16


def _over_queries(plan: Plan, attend, products, found, by_row, k, v, outs, *, apart, **memory):
    """Call `attend` for every tile of queries, or two at a time when `apart`."""
    at_once = 2 if apart else 1

    def decode(scalars, number):
        group = scalars[0]
        # the first key of each tile's block
        keys = [group[number * at_once + n] * plan.block for n in range(at_once)]
        return Tile(i32(at_once * (plan.block // STEP)), (number, keys))

    def rows_at(at, ref):
        size = at_once * ROWS
        return ref.at[pl.ds(pl.multiple_of(at[0] * size, size), size)]

    def step_at(at, k, ref):
        keys = at[1]
        key = keys[0] + k * STEP
        if apart:
            key = jnp.where(lax.rem(k, i32(2)) == 0, *keys) + lax.div(k, i32(2)) * STEP
        return ref.at[pl.ds(pl.multiple_of(key, STEP), STEP)]

    def out_at(at, place, ref, columns):
        row = (at[0] * at_once + (place if apart else 0)) * ROWS
        rows = pl.ds(pl.multiple_of(row, ROWS), ROWS)
        return ref.at[rows] if columns is None else ref.at[rows, columns]

    def total(scalars):
        return lax.div(scalars[1][0] + i32(at_once - 1), i32(at_once))

    return blackwell_attention.over_tiles(
        lambda tile, own, _: attend(tile, own), products, decode, by_row, [k, v], outs,
        rows_at=rows_at, step_at=step_at, out_at=out_at, total=total, apart=apart,
        scalars=[found.group, found.used[None]], **memory)


def _forward_tiles(plan: Plan, q, found, k, v):
    """Return o [Z x X, Dv] of every row over its tile's block alone, and lse [Z x X]."""
    factor = plan.scale * LOG2E

    def products(rows, streamed):
        return [(rows[0], streamed[0])], [streamed[1]]

    def attend(tile, own):
        def later(k, old):
            def part(raw, keep, *_):
                pieces = [raw(0, column) * factor for column in PIECES]
                top = functools.reduce(jnp.maximum, (x.max(axis=1) for x in pieces), old[0])
                return blackwell_scores.soften(own, old, top, pieces, keep, k > 1)

            return own.meet(k, part)

        start = blackwell_scores.unseen(EMPTY)
        top, total = own.each(0, tile.steps, later, start)

        def divided(column, width):
            values = own.take(0, column, width)
            return values / hopper.spread(total, values.shape, 0)

        return divided, top * (1 / LOG2E) + jnp.log(total)

    Z = found.group.shape[0]
    outs = [(jax.ShapeDtypeStruct((Z * ROWS, plan.Dv), _BF16), plan.Dv),
            (jax.ShapeDtypeStruct((Z * ROWS,), _F32), 1)]
    return _over_queries(plan, attend, products, found, [q], k, v, outs, apart=True, scores=1,
                         weights=1, sums=[plan.Dv])


def _query_gradient_tiles(plan: Plan, q, do, lse2, delta, found, k, v):
    """Return dq / scale [Z x X, Dk] of every row from its tile's block alone."""
    factor = plan.scale * LOG2E

    def products(rows, streamed):
        return list(zip(rows[:2], streamed, strict=True)), [streamed[0]]

    def attend(tile, own):
        lse, delta = (plgpu.load(x, layout=ROW) for x in own.rows[2:])

        def later(k, _):
            def part(raw, keep, *_):
                for column in PIECES:
                    weights = jnp.exp2(raw(0, column) * factor - hopper.spread(lse, SHAPE, 0))
                    more = raw(1, column) - hopper.spread(delta, SHAPE, 0)
                    keep(0, column, weights * more)

            own.meet(k, part)

        own.each(0, tile.steps, later, None)
        return [functools.partial(own.take, 0)]

    outs = [(jax.ShapeDtypeStruct((found.group.shape[0] * ROWS, plan.Dk), _BF16), plan.Dk)]
    return _over_queries(plan, attend, products, found, [q, do, lse2, delta], k, v, outs,
                         apart=False, scores=2, weights=1, sums=[plan.Dk])[0]


def _key_gradient_tiles(plan: Plan, found, q, do, lse2, delta, k, v, *, keys=False, values=False):
    """Return the gradients that are asked for, dk / scale and dv [E, block, D] in float32.

    A tile has 128 keys; where blocks are of an odd number of 64, half of them are the next block's
    and what is added up for them is not written.
    """
    factor = plan.scale * LOG2E
    items = mosaic_gpu_bwd.items_of(plan, found, 1)
    spare = ((0, ROWS - plan.owned), (0, 0))
    fixed = [jnp.pad(x, spare) for x in ([k, v] if keys else [k])]

    def decode(scalars, number):
        first, count, key, row = (scalars[0][number, n] for n in range(4))
        return Tile(count * (ROWS // STEP), (first * ROWS, key, row))

    def rows_at(at, ref):
        return ref.at[pl.ds(pl.multiple_of(at[1], STEP), ROWS)]

    def step_at(at, k, ref):
        return ref.at[pl.ds(pl.multiple_of(at[0] + k * STEP, STEP), STEP)]

    def out_at(at, place, ref, columns):
        return ref.at[pl.ds(pl.multiple_of(at[2], STEP), plan.owned), columns]

    def products(rows, streamed):
        return list(zip(rows, streamed, strict=False)), streamed[1 - keys:1 + values]

    def attend(tile, own, _):
        def later(k, _):
            def part(raw, keep, q_smem, do_smem, *numbers):
                for column in PIECES:
                    lse, delta = (cut(x, column) for x in numbers)
                    less = hopper.spread(plgpu.load(lse, layout=COLUMN), SHAPE, 1)
                    weights = jnp.exp2(raw(0, column) * factor - less)
                    if values:
                        keep(keys, column, weights)
                    if keys:
                        less = hopper.spread(plgpu.load(delta, layout=COLUMN), SHAPE, 1)
                        keep(0, column, weights * (raw(1, column) - less))

            own.meet(k, part)

        own.each(0, tile.steps, later, None)
        return [functools.partial(own.take, n) for n in range(keys + values)]

    widths = [plan.Dk] * keys + [plan.Dv] * values
    rows = plan.parts * plan.groups * plan.block
    outs = [(jax.ShapeDtypeStruct((rows, D), _F32), D) for D in widths]
    sums = blackwell_attention.over_tiles(
        attend, products, decode, fixed, [q, do, lse2, delta], outs, rows_at=rows_at,
        step_at=step_at, out_at=out_at, total=lambda _: i32(items.shape[0]), scalars=[items],
        apart=False, kept=plan.owned, scores=1 + keys, weights=keys + values, sums=widths)
    return [x.reshape(plan.parts, plan.groups, plan.block, -1).sum(0) for x in sums]


def _backward_tiles(plan: Plan, q, do, lse, delta, found, k, v):
    lse2 = lse * LOG2E
    dq = _query_gradient_tiles(plan, q, do, lse2, delta, found, k, v)
    arrays = (plan, found, q, do, lse2, delta, k, v)
    if blackwell_scores.fits(scores=2, weights=2, sums=[plan.Dk, plan.Dv], apart=False):
        return dq, _key_gradient_tiles(*arrays, keys=True, values=True)
    return dq, [*_key_gradient_tiles(*arrays, keys=True),
                *_key_gradient_tiles(*arrays, values=True)]


block_sparse = functools.partial(
    mosaic_gpu.block_sparse,
    kernels=by_block.Kernels(_forward_tiles, _backward_tiles, multiple=2))
