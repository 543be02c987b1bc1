"""The gradients of flash on a TPU's matrix units.

One kernel adds up a tile of queries over its keys, and one a tile of keys over the queries of all
heads that share its head. Each computes the scores again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.flash import tpu_plan, tpu_scores
from kernels_pallas.flash.tpu_plan import Plan
from kernels_pallas.flash.tpu_scores import Laid

_F32 = jnp.float32


def _queries_body(plan: Plan, mine, other, plain, q, k, v, do, numbers, own, others, dq, acc):
    del other
    z = pl.program_id(1)
    first, last = tpu_scores.ends_of_tile(mine, z)

    @pl.when(first)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def add(masked):
        _, d = tpu_scores.weights_and_gradients(plan, masked, q, k, v, do, own, others, numbers)
        acc[...] += tpu.dot(k[...], d.astype(k.dtype), (0, 0))

    tpu_scores.either(plan, plain[z], add)

    @pl.when(last)
    def _():
        dq[...] = (acc[...] * plan.position.scale).T.astype(dq.dtype)


def _keys_body(plan: Plan, mine, other, plain, q, k, v, do, numbers, own, others, dk, dv,
               dk_sum, dv_sum):
    del other
    z, g = pl.program_id(1), pl.program_id(2)
    first, last = tpu_scores.ends_of_tile(mine, z)

    @pl.when(first & (g == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def add(masked):
        weights, d = tpu_scores.weights_and_gradients(plan, masked, q, k, v, do, own, others,
                                                      numbers)
        dk_sum[...] += tpu.dot(d.astype(q.dtype), q[...], (1, 0))
        dv_sum[...] += tpu.dot(weights.astype(do.dtype), do[...], (1, 0))

    tpu_scores.either(plan, plain[z], add)

    @pl.when(last & (g == plan.G - 1))
    def _():
        dk[...] = (dk_sum[...] * plan.position.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _specs(laid: Laid, query, key):
    """How blocks of q, k, v, do, numbers, own and others come; (head, tile) of a grid's place."""
    t, n = laid.sizes

    def rows(size, place, width):
        return pl.BlockSpec((None, size, width), lambda *at: (*place(*at), 0))

    def marks(count, size, place):
        return pl.BlockSpec((None, count, size), lambda *at: (place(*at)[1], 0, 0))

    numbers = pl.BlockSpec((None, None, 2, t), lambda *at: (*query(*at), 0, 0))
    return (functools.partial(rows, t, query), functools.partial(rows, n, key),
            [numbers, marks(2, t, query), marks(tpu_plan.COLUMNS, n, key)])


def query_gradient(plan: Plan, laid: Laid, q, k, v, do, numbers):
    """Return dq [H, B x L, D]."""
    visits = tpu_plan.listed(plan, laid.table, by_key=False)
    by_query, by_key, marks = _specs(
        laid, lambda h, z, mine, other, plain: (h, mine[z]),
        lambda h, z, mine, other, plain: (lax.div(h, jnp.int32(plan.G)), other[z]))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3, grid=(plan.H, visits.used),
        in_specs=[by_query(plan.D), by_key(plan.D), by_key(plan.V), by_query(plan.V), *marks],
        out_specs=by_query(plan.D),
        scratch_shapes=[pltpu.VMEM((plan.D, laid.sizes[0]), _F32)])
    return tpu.call(functools.partial(_queries_body, plan), "flash_query_gradient",
                    jax.ShapeDtypeStruct(q.shape, q.dtype), ("parallel", "arbitrary"),
                    grid_spec=grid)(*visits[:3], q, k, v, do, numbers, laid.own, laid.others)


def key_gradients(plan: Plan, laid: Laid, q, k, v, do, numbers):
    """Return dk [K, B x S, D] and dv [K, B x S, V]."""
    visits = tpu_plan.listed(plan, laid.table, by_key=True)
    by_query, by_key, marks = _specs(
        laid, lambda j, z, g, mine, other, plain: (j * plan.G + g, other[z]),
        lambda j, z, g, mine, other, plain: (j, mine[z]))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3, grid=(plan.K, visits.used, plan.G),
        in_specs=[by_query(plan.D), by_key(plan.D), by_key(plan.V), by_query(plan.V), *marks],
        out_specs=[by_key(plan.D), by_key(plan.V)],
        scratch_shapes=[pltpu.VMEM((laid.sizes[1], width), _F32) for width in (plan.D, plan.V)])
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    return tpu.call(functools.partial(_keys_body, plan), "flash_key_gradients", outs,
                    ("parallel", "arbitrary", "arbitrary"), grid_spec=grid)(
        *visits[:3], q, k, v, do, numbers, laid.own, laid.others)
