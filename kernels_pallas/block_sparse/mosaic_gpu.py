"""Attention to chosen blocks on Hopper's tensor cores: bfloat16, accumulated in float32.

Pairs of a query and a block are sorted by block and cut into tiles of 128 query rows (tiles.py), as
in xla.py; here a kernel multiplies a tile with its block. One warpgroup of a program copies, two
multiply, 64 rows each. The results of a
query's choices are merged by the logarithms of their denominators, by number and never by adding
to memory: the same bits every time. The gradient of the keys is in mosaic_gpu_bwd.py.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, rows
from kernels_pallas.block_sparse import mosaic_gpu_bwd, tiles
from kernels_pallas.block_sparse.gpu_plan import HALF, Plan, X, plan_of

# A row that sees nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = -1e30, -1e29
LOG2E = math.log2(math.e)
_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of a product's result


def _over_tiles(plan: Plan, attend, by_row, outs, found, k, v):
    """Call `attend` for every tile, with its rows and its block's keys and values."""
    spare = [(HALF, plan.keys)] if hopper.interpreted() else []
    return hopper.over_tiles(attend, by_row, [k, v], outs, steps=plan.block // plan.keys,
                             step_rows=plan.keys, group=found.group, used=found.used[None],
                             scratch=spare)


def _forward_tiles(plan: Plan, q, found, k, v):
    """Return o [Z x X, Dv] of every row over its tile's block alone, and lse [Z x X]."""
    steps, factor = plan.block // plan.keys, plan.scale * LOG2E

    def attend(by_row, keys, _, spare):
        (q_smem,) = by_row
        scores, result = (HALF, plan.keys), (HALF, plan.Dv)

        def part(k_smem, v_smem, old=None):
            def score(acc):
                plgpu.wgmma(acc, q_smem, k_smem.transpose((1, 0)))
                return acc[...]

            raw = pl.run_scoped(score, plgpu.ACC(scores, _F32))
            top = raw.max(axis=1) * factor
            if old is not None:
                top = jnp.maximum(top, old[0])
            weights = jnp.exp2(raw * factor - hopper.spread(top, scores, 0))
            total = weights.sum(axis=1)

            def weigh(acc):
                hopper.weigh(acc, weights.astype(_BF16), v_smem, *spare)
                return acc[...]

            o = pl.run_scoped(weigh, plgpu.ACC(result, _F32))
            if old is None:
                return top, total, o
            shrink = jnp.exp2(old[0] - top)
            return top, old[1] * shrink + total, old[2] * hopper.spread(shrink, result, 0) + o

        def later(c, old):
            return keys(c, functools.partial(part, old=old))

        top, total, o = lax.fori_loop(1, steps, later, keys(0, part))
        o = o / hopper.spread(total, result, 0)
        return o, top * (1 / LOG2E) + jnp.log(total)

    Z = found.group.shape[0]
    outs = [jax.ShapeDtypeStruct((Z * X, plan.Dv), _BF16), jax.ShapeDtypeStruct((Z * X,), _F32)]
    return _over_tiles(plan, attend, [q], outs, found, k, v)


def _query_gradient_tiles(plan: Plan, q, do, lse2, delta, found, k, v):
    """Return dq / scale [Z x X, Dk] of every row from its tile's block alone.

    `lse2` is the logarithm to base 2 of the denominator, over all of a row's choices.
    """
    steps, factor = plan.block // plan.keys, plan.scale * LOG2E

    def attend(by_row, keys, _, spare):
        q_smem, do_smem, lse_smem, delta_smem = by_row
        shape = (HALF, plan.keys)
        lse, delta = (plgpu.load(x, layout=_ROW) for x in (lse_smem, delta_smem))

        def sum_up(dq):
            def step(c, _):
                def part(k_smem, v_smem):
                    def both(score, d_weight):
                        plgpu.wgmma(score, q_smem, k_smem.transpose((1, 0)))
                        plgpu.wgmma(d_weight, do_smem, v_smem.transpose((1, 0)))
                        raw = plgpu.wgmma_accumulator_load(score, wait_n=1)
                        weights = jnp.exp2(raw * factor - hopper.spread(lse, shape, 0))
                        return weights * (d_weight[...] - hopper.spread(delta, shape, 0))

                    acc = plgpu.ACC(shape, _F32)
                    d_scores = pl.run_scoped(both, acc, acc)
                    hopper.weigh(dq, d_scores.astype(_BF16), k_smem, *spare)
                    plgpu.wgmma_wait(0)

                keys(c, part)

            lax.fori_loop(0, steps, step, None)
            return dq[...]

        return [pl.run_scoped(sum_up, plgpu.ACC((HALF, plan.Dk), _F32))]

    outs = [jax.ShapeDtypeStruct((found.group.shape[0] * X, plan.Dk), _BF16)]
    return _over_tiles(plan, attend, [q, do, lse2, delta], outs, found, k, v)[0]


# Around the kernels: sorting, gathering and merging by number.


def _groups(plan: Plan, blocks):
    """Return the group of every pair, plan.groups for none: [B x L, G, N]."""
    blocks = tiles.distinct(blocks, plan.M)
    head = jnp.arange(plan.G, dtype=jnp.int32) // (plan.G // plan.K)
    lane = jnp.arange(plan.B, dtype=jnp.int32)[:, None] * plan.K + head[None, :]
    group = lane[:, None, :, None] * plan.M + blocks
    return jnp.where(blocks < 0, plan.groups, group)


def _cut(plan: Plan, group):
    """Cut a chunk's pairs into tiles."""
    return tiles.cut(group.reshape(-1, plan.N), plan.groups, plan.T, 1, method="scan_unrolled")


def _by_block(plan: Plan, x, starts):
    """Return the keys [B, S, K, D] of every group: [E x block, D]."""
    at = jnp.arange(plan.block, dtype=jnp.int32)
    at = jnp.clip(starts.astype(jnp.int32)[:, :, None] + at[None, None], 0, plan.S - 1)
    x = jnp.take_along_axis(x, at.reshape(plan.B, -1)[:, :, None, None], axis=1)
    return x.swapaxes(1, 2).reshape(-1, x.shape[-1])


def _sort(plan: Plan, x, row_ZxT, fill=0):
    """Return rows [chunk x G, R, ...] by slot: [Z x X, ...], `fill` where there is none."""
    rest = x.shape[2:]
    x = jnp.pad(x.reshape(x.shape[0], -1), ((0, 1), (0, 0)), constant_values=fill)
    x = x.at[row_ZxT].get(mode="promise_in_bounds")
    x = x.reshape(row_ZxT.shape[0], plan.T * plan.R, *rest)
    widths = ((0, 0), (0, X - x.shape[1]), *((0, 0) for _ in rest))
    return jnp.pad(x, widths, constant_values=fill).reshape(-1, *rest)


def _unsorted(plan: Plan, x):
    """Return what tiles hold [Z x X, ...] by slot: [Z x T, R, ...]."""
    x = x.reshape(-1, X, *x.shape[1:])[:, :plan.T * plan.R]
    return x.reshape(-1, plan.R, *x.shape[2:])


def _choice(x, slot, some, nothing=0):
    """Read slots [rows], `nothing` where there is none: [rows, R, ...]."""
    read = x.at[jnp.where(some, slot, 0)].get(mode="promise_in_bounds").astype(_F32)
    return jnp.where(some.reshape(-1, *(1 for _ in x.shape[1:])), read, nothing)


def _forward_chunk(plan: Plan, k, v, _, chunk):
    q, group = chunk
    found = _cut(plan, group)
    q = _sort(plan, q.reshape(-1, plan.R, plan.Dk), found.row)
    o, lse = (_unsorted(plan, x) for x in _forward_tiles(plan, q, found, k, v))
    some = found.slot < found.row.size
    parts = [_choice(lse, found.slot[:, n], some[:, n], NOTHING) for n in range(plan.N)]
    top = jnp.maximum(functools.reduce(jnp.maximum, parts), EMPTY)
    weights = [jnp.exp(part - top) for part in parts]
    total = functools.reduce(jnp.add, weights)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    merged = sum(_choice(o, found.slot[:, n], some[:, n]) * (weights[n] / total)[..., None]
                 for n in range(plan.N))
    return None, (merged.astype(_BF16), jnp.where(seen, top + jnp.log(total), NOTHING))


def _backward_chunk(plan: Plan, k, v, carry, chunk):
    q, do, lse2, delta, group = chunk
    found = _cut(plan, group)
    q, do = (_sort(plan, x.reshape(-1, plan.R, x.shape[-1]), found.row) for x in (q, do))
    # A slot without a pair weighs exp2(0 - 1e30) = 0.
    lse2 = _sort(plan, lse2.reshape(-1, plan.R), found.row, -NOTHING)
    delta = _sort(plan, delta.reshape(-1, plan.R), found.row)
    dq = _query_gradient_tiles(plan, q, do, lse2, delta, found, k, v)
    dq = _unsorted(plan, dq)
    some = found.slot < found.row.size
    dq = sum(_choice(dq, found.slot[:, n], some[:, n]) for n in range(plan.N))
    d_keys = mosaic_gpu_bwd.key_gradients(plan, found, q, do, lse2, delta, k, v)
    carry = tuple(a + b for a, b in zip(carry, d_keys, strict=True))
    return carry, (dq * plan.scale).astype(_BF16)


def _scan(plan: Plan, step, carry, xs):
    """Go through the queries [B, L, ...] by chunks."""
    xs = [rows.in_chunks(x, plan.chunk, fill) for x, fill in xs]
    if xs[0].shape[0] == 1:  # no loop to compile
        carry, out = step(carry, [x[0] for x in xs])
        return carry, jax.tree.map(lambda x: x[None], out)
    return lax.scan(step, carry, xs)


def _queries(plan: Plan, x):
    """Return results [chunks, chunk x G, R, ...] by query: [B, L, H, ...]."""
    rest = x.shape[3:]
    x = x.reshape(-1, plan.H, *rest)
    return x[:plan.B * plan.L].reshape(plan.B, plan.L, plan.H, *rest)


def _forward(plan: Plan, q, k, v, blocks, starts):
    step = functools.partial(_forward_chunk, plan, _by_block(plan, k, starts),
                             _by_block(plan, v, starts))
    _, (o, lse) = _scan(plan, step, None, [(q, 0), (_groups(plan, blocks), plan.groups)])
    return _queries(plan, o), _queries(plan, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, blocks, starts):
    return _forward(plan, q, k, v, blocks, starts)


def _attend_forward(plan, q, k, v, blocks, starts):
    o, lse = _forward(plan, q, k, v, blocks, starts)
    return (o, lse), (q, k, v, blocks, starts, o, lse)


def _attend_backward(plan, kept, cotangents):
    q, k, v, blocks, starts, o, lse = kept
    do, d_lse = cotangents
    delta = (do.astype(_F32) * o.astype(_F32)).sum(-1) - d_lse
    step = functools.partial(_backward_chunk, plan, _by_block(plan, k, starts),
                             _by_block(plan, v, starts))
    carry = tuple(jnp.zeros((plan.groups, plan.block, D), _F32) for D in (plan.Dk, plan.Dv))
    (dk, dv), dq = _scan(plan, step, carry, [
        (q, 0), (do, 0), (lse * LOG2E, -NOTHING), (delta, 0),
        (_groups(plan, blocks), plan.groups)])
    dk, dv = mosaic_gpu_bwd.by_key(plan, (dk * plan.scale, dv), blocks, starts)
    return _queries(plan, dq), dk.astype(_BF16), dv.astype(_BF16), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def block_sparse(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, *, block, scale,
                 return_lse=False):
    """Attend tile by tile."""
    arrays = (q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM)
    plan = plan_of(*arrays, block=block, scale=scale)
    if 0 in (plan.B, plan.L, plan.N, plan.M) or plan.S < block:
        o = jnp.zeros((*q_BxLxHxDk.shape[:3], plan.Dv), _BF16)
        lse = jnp.full(q_BxLxHxDk.shape[:3], NOTHING, _F32)
    else:
        o, lse = _attend(plan, *arrays)
    return (o, lse) if return_lse else o
