"""Attention to chosen blocks on a TPU's matrix units, accumulated in float32.

Each step of the grid multiplies a tile of query rows with its block, which the tile's number tells
before the step's copies start; by_block.py makes the tiles and merges what they give. Scores lie
keys by queries, so that what belongs to a query is a row of numbers. Tiles of one block follow one
another, and its gradient stays in fast memory while they add to it in their order: the same bits
every time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.block_sparse import by_block
from kernels_pallas.block_sparse.plan import TPU_X, Plan, plan_of

_F32 = jnp.float32


def _call(body, found, by_tile, by_group, tile_outs, group_outs=(), scratch=()):
    """Run body over the tiles in use, on arrays [Z, X, D] or [Z, 1, X], and [E, block, D]."""
    def of_tile(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda z, group, used: (z, 0, 0))

    def of_group(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda z, group, used: (group[z], 0, 0))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2, grid=(found.used,),
        in_specs=[*map(of_tile, by_tile), *map(of_group, by_group)],
        out_specs=[*map(of_tile, tile_outs), *map(of_group, group_outs)],
        scratch_shapes=scratch)
    outs = [*tile_outs, *group_outs]
    return tpu.call(body, "block_sparse", outs, ("arbitrary",), grid_spec=grid)(
        found.group, found.used[None], *by_tile, *by_group)


def _forward_body(scale, group, used, q, k, v, o, lse):
    """The softmax of a tile over its block alone."""
    del group, used
    scores = tpu.dot(k[...], q[...], (1, 1)) * scale  # [block, X]
    top = scores.max(0, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(0, keepdims=True)
    o[...] = tpu.dot((weights / total).astype(v.dtype), v[...], (0, 0)).astype(o.dtype)
    lse[...] = top + jnp.log(total)


def _by_tile(plan: Plan, x):
    """Return rows [Z x X, D] as [Z, X, D], and numbers [Z x X] as [Z, 1, X]."""
    return x.reshape((-1, plan.X, x.shape[1]) if x.ndim == 2 else (-1, 1, plan.X))


def _by_group(plan: Plan, x):
    return x.reshape(plan.groups, plan.block, -1)


def _forward_tiles(plan: Plan, q, found, k, v):
    Z, shape = found.group.shape[0], jax.ShapeDtypeStruct
    outs = [shape((Z, plan.X, plan.Dv), v.dtype), shape((Z, 1, plan.X), _F32)]
    o, lse = _call(functools.partial(_forward_body, plan.scale), found,
                   [_by_tile(plan, q)], [_by_group(plan, x) for x in (k, v)], outs)
    return o.reshape(-1, plan.Dv), lse.reshape(-1)


def _backward_body(scale, group, used, q, do, lse, delta, k, v, dq, dk, dv, dk_sum, dv_sum):
    """The gradients of a tile, and those of its block, which its other tiles add to."""
    z = pl.program_id(0)
    first = (z == 0) | (group[z] != group[jnp.maximum(z - 1, 0)])
    after = jnp.minimum(z + 1, group.shape[0] - 1)
    last = (z == used[0] - 1) | (group[z] != group[after])
    weights = jnp.exp(tpu.dot(k[...], q[...], (1, 1)) * scale - lse[...])  # [block, X]
    d_scores = weights * (tpu.dot(v[...], do[...], (1, 1)) - delta[...])
    d_scores = d_scores.astype(q.dtype)
    dq[...] = tpu.dot(d_scores, k[...], (0, 0)).astype(dq.dtype)

    @pl.when(first)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dk_sum[...] += tpu.dot(d_scores, q[...], (1, 0))
    dv_sum[...] += tpu.dot(weights.astype(do.dtype), do[...], (1, 0))

    @pl.when(last)
    def _():
        dk[...] = dk_sum[...]
        dv[...] = dv_sum[...]


def _backward_tiles(plan: Plan, q, do, lse, delta, found, k, v):
    Z, E, shape = found.group.shape[0], plan.groups, jax.ShapeDtypeStruct
    sums = [(plan.block, plan.Dk), (plan.block, plan.Dv)]
    rows = [_by_tile(plan, x) for x in (q, do, lse, delta)]
    dq, *d_keys = _call(functools.partial(_backward_body, plan.scale), found,
                        rows, [_by_group(plan, x) for x in (k, v)],
                        [shape((Z, plan.X, plan.Dk), q.dtype)],
                        [shape((E, *s), _F32) for s in sums], [pltpu.VMEM(s, _F32) for s in sums])
    # Nothing was written for a block without a tile.
    used = jnp.arange(Z, dtype=jnp.int32) < found.used
    some = jnp.zeros(E + 1, bool).at[jnp.where(used, found.group, E)].set(True)[:E]
    d_keys = [jnp.where(some[:, None, None], x, 0) for x in d_keys]
    return dq.reshape(-1, plan.Dk), d_keys


_KERNELS = by_block.Kernels(_forward_tiles, _backward_tiles)


def block_sparse(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, *, block, scale,
                 return_lse=False):
    """Attend tile by tile."""
    arrays = (q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM)
    plan = plan_of(*arrays, block=block, scale=scale, rows=TPU_X)
    o, lse = by_block.attend(_KERNELS, plan, *arrays)
    return (o, lse) if return_lse else o
