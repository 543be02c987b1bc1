"""Attention on a TPU's matrix units, accumulated in float32.

Each step of the grid is a visit of tpu_plan.py: a tile of one head's queries meets some keys.
Scores lie keys by queries, so that what belongs to a query is a row of numbers; sums over keys lie
transposed, and are turned once, at a tile's last visit. Only o and the logarithm of the softmax's
denominator are kept. The gradients are made by tiles of queries and by tiles of keys (in
mosaic_tpu_bwd.py), each of which adds up in fast memory and in one order: the same bits every time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.flash import mosaic_tpu_bwd, pairs, tpu_plan, tpu_scores
from kernels_pallas.flash.pairs import EMPTY, MASKED
from kernels_pallas.flash.table import table_of
from kernels_pallas.flash.tpu_plan import Plan
from kernels_pallas.flash.tpu_scores import Laid

_F32 = jnp.float32


def _body(plan: Plan, mine, other, plain, sinks, q, k, v, own, others, o, lse, top, total, acc):
    del other
    z = pl.program_id(1)
    first, last = tpu_scores.ends_of_tile(mine, z)

    @pl.when(first)
    def _():
        top[...] = jnp.full_like(top, EMPTY)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def add(masked):
        found, _ = tpu_scores.scores(plan, q, k)
        if masked:
            found = jnp.where(tpu_scores.seen(plan, own, others), found, MASKED)
        highest = jnp.maximum(top[...], found.max(0, keepdims=True))
        weights = jnp.exp(found - highest)
        shrink = jnp.exp(top[...] - highest)
        top[...] = highest
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        acc[...] = acc[...] * shrink + tpu.dot(v[...], weights.astype(v.dtype), (0, 0))

    tpu_scores.either(plan, plain[z], add)

    @pl.when(last)
    def _():
        sink = sinks[pl.program_id(0)]
        highest = jnp.maximum(top[...], sink)
        shrink = jnp.exp(top[...] - highest)
        whole = total[...] * shrink + jnp.exp(sink - highest)
        some = whole > 0
        whole = jnp.where(some, whole, 1.0)
        lse[...] = jnp.where(some, highest + jnp.log(whole), MASKED)
        o[...] = (acc[...] * (shrink / whole)).T.astype(o.dtype)


def _tiles(plan: Plan, laid: Laid, q, k, v, sinks):
    """Return o [H, B x L, V] and lse [H, B x tiles, 1, t]."""
    (t, n), shape = laid.sizes, jax.ShapeDtypeStruct
    by_query = functools.partial(pl.BlockSpec, index_map=lambda h, z, mine, other, plain: (
        h, mine[z], 0))
    by_key = functools.partial(pl.BlockSpec, index_map=lambda h, z, mine, other, plain: (
        lax.div(h, jnp.int32(plan.G)), other[z], 0))
    numbers = pl.BlockSpec((None, None, 1, t), lambda h, z, mine, other, plain: (h, mine[z], 0, 0))
    visits = tpu_plan.listed(plan, laid.table, by_key=False)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3, grid=(plan.H, visits.used),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM), by_query((None, t, plan.D)),
            by_key((None, n, plan.D)), by_key((None, n, plan.V)),
            pl.BlockSpec((None, 2, t), lambda h, z, mine, other, plain: (mine[z], 0, 0)),
            pl.BlockSpec((None, tpu_plan.COLUMNS, n),
                         lambda h, z, mine, other, plain: (other[z], 0, 0))],
        out_specs=[by_query((None, t, plan.V)), numbers],
        scratch_shapes=[pltpu.VMEM((1, t), _F32), pltpu.VMEM((1, t), _F32),
                        pltpu.VMEM((plan.V, t), _F32)])
    outs = [shape((plan.H, plan.B * plan.L, plan.V), v.dtype),
            shape((plan.H, plan.B * plan.tiles, 1, t), _F32)]
    return tpu.call(functools.partial(_body, plan), "flash_forward", outs,
                    ("parallel", "arbitrary"), grid_spec=grid)(
        *visits[:3], sinks, q, k, v, laid.own, laid.others)


def _laid_out(plan: Plan, q, k, v):
    return (tpu_scores.heads_first(q, plan.L, plan.D), tpu_scores.heads_first(k, plan.S, plan.D),
            tpu_scores.heads_first(v, plan.S, plan.V))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, marks, sinks):
    return _forward(plan, q, k, v, marks, sinks)


def _forward(plan: Plan, q, k, v, marks, sinks):
    """Return o [B, L, H, Dv] and lse [B, L, H]."""
    L, Dv = q.shape[1], v.shape[3]
    laid = tpu_scores.lay(plan, table_of(plan, marks))
    sinks = jnp.full(plan.H, MASKED, _F32) if sinks is None else sinks.astype(_F32)
    q, k, v = _laid_out(plan, q, k, v)
    o, lse = _tiles(plan, laid, q, k, v, sinks)
    o = tpu_scores.heads_back(o, plan.B)[:, :L, :, :Dv]
    return o, lse.reshape(plan.H, plan.B, plan.L)[:, :, :L].transpose(1, 2, 0)


def _attend_forward(plan, q, k, v, marks, sinks):
    o, lse = _forward(plan, q, k, v, marks, sinks)
    return (o, lse), (q, k, v, marks, sinks, o, lse)


def _attend_backward(plan: Plan, kept, cotangents):
    (q, k, v, marks, sinks, o, lse), (do, d_lse) = kept, cotangents
    # the gradient of lse by a score is the weight
    delta = (do.astype(_F32) * o.astype(_F32)).sum(-1) - d_lse
    less = jnp.where(lse > EMPTY, lse, -MASKED)  # a row that sees nothing has weights of 0
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(_F32)[None, None] - less)
        d_sinks = -(weight * delta).sum((0, 1)).astype(sinks.dtype)
    laid = tpu_scores.lay(plan, table_of(plan, marks))
    numbers = tpu_scores.numbers(plan, less, delta)
    shapes = [x.shape for x in (q, k, v)]
    q, k, v = _laid_out(plan, q, k, v)
    do = tpu_scores.heads_first(do, plan.L, plan.V)
    dq = mosaic_tpu_bwd.query_gradient(plan, laid, q, k, v, do, numbers)
    dk, dv = mosaic_tpu_bwd.key_gradients(plan, laid, q, k, v, do, numbers)
    dq, dk, dv = (tpu_scores.heads_back(x, plan.B)[:, :rows, :, :width]
                  for x, (_, rows, _, width) in zip((dq, dk, dv), shapes, strict=True))
    return dq, dk, dv, None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None,
          ends_BxS=None, first=None, sinks_H=None, return_lse=False, **keywords):
    """Attend tile by tile."""
    arrays = q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv
    plan = tpu_plan.plan_of(*arrays, segments_q=segments_q, ends_BxS=ends_BxS, first=first,
                            **keywords)
    assert plan is not None, "supports() refused it"
    marks = pairs.Marks(segments_q, segments_k, ends_BxS,
                        None if first is None else jnp.asarray(first, jnp.int32))
    o, lse = _attend(plan, *arrays, marks, sinks_H)
    return (o, lse) if return_lse else o
