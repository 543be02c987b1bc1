"""The gradients of keys and values of flash on Hopper's tensor cores.

A warpgroup owns 64 keys of one key head and meets the queries of all heads that share it, one head
after the other, in rows of keys and columns of queries. Beside a gradient of keys wider than 64
there are no registers for that of the values, which then is a kernel of its own and scores once
more.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.flash import gpu_scores, gpu_tiles
from kernels_pallas.flash.gpu_plan import HALF, NOTHING, STEP, Plan
from kernels_pallas.flash.gpu_scores import COLUMN, ROW
from kernels_pallas.flash.table import Table

_F32, _BF16 = jnp.float32, jnp.bfloat16


def key_gradients(plan: Plan, table: Table, q, do, lse, delta, k, v):
    """Return dk / scale [B, S, K, D] and dv [B, S, K, V] in bfloat16.

    `lse` is to base 2, 1e30 for rows that see nothing; arrays are as in memory.
    """
    if not plan.apart:
        return _tiles(plan, table, q, do, lse, delta, k, v, keys=True, values=True)
    return (*_tiles(plan, table, q, do, lse, delta, k, v, keys=True),
            *_tiles(plan, table, q, do, lse, delta, k, v, values=True))


def _tiles(plan: Plan, table: Table, q, do, lse, delta, k, v, *, keys=False, values=False):
    """Return the gradients that are asked for."""
    own = [table.own] if plan.segmented else []
    others = [table.ends, *([table.others] if plan.segmented else [])]
    fixed = [k, v] if keys else [k]  # of the keys' gradient alone the values come second
    shapes = [plan.D] * keys + [plan.V] * values
    size = 2 * STEP if not keys else STEP if values else plan.step
    shape = (HALF, size)
    # of each step what is multiplied first comes first
    by_query, by_result = [q, lse, *own], [do, delta]
    first, last = (by_query, by_result) if values else (by_result, by_query)

    def attend(tile, _, stream, scalars, spare):
        (first_gmem,) = scalars

        def weigh(rows, step, q_smem, lse_smem, *own_smem):
            """Return weights and, for a cap, the capped scores over it."""
            ends_smem, *others_smem = rows[len(fixed):]
            found, bent = gpu_scores.scores(plan, gpu_scores.product(rows[0], q_smem, shape))
            segments = [plgpu.load(x[0], layout=layout) if x else None
                        for x, layout in ((own_smem, COLUMN), (others_smem, ROW))]
            may = gpu_scores.seen(
                plan, first_gmem[0], step * size, plgpu.load(ends_smem, layout=ROW),
                *segments, by_key=True, shape=shape)
            less = hopper.spread(plgpu.load(lse_smem, layout=COLUMN), shape, 1)
            return jnp.exp2(jnp.where(may, found, NOTHING) - less), bent

        def exceed(rows, do_smem, delta_smem):
            """Return what the weights' gradients exceed delta by."""
            less = hopper.spread(plgpu.load(delta_smem, layout=COLUMN), shape, 1)
            return gpu_scores.product(rows[1], do_smem, shape) - less

        def sum_up(*sums):
            def add_values(turn, step, _):
                rows, queries, results = stream(turn, step)
                q_smem, *numbers = queries.wait()
                # One product after the other, and weights kept in bfloat16: beside two sums
                # registers have room for no more.
                weights, bent = weigh(rows, step, q_smem, *numbers)
                weights = weights.astype(_BF16)
                do_smem, delta_smem = results.wait()
                hopper.weigh(sums[-1], weights, do_smem, *spare[-1:])
                if keys:
                    more = exceed(rows, do_smem, delta_smem)
                    d_scores = gpu_scores.gradient(weights.astype(_F32), more, bent)
                    hopper.weigh(sums[0], d_scores.astype(_BF16), q_smem, *spare[:1])
                plgpu.wgmma_wait(0)
                queries.release(read=True)
                results.release(read=keys)

            def add_keys(turn, step, _):
                rows, results, queries = stream(turn, step)
                # 64 x 128 numbers are 64 registers, and a number for each column is 32: done with
                # here, before the next are read.
                more = lax.optimization_barrier(exceed(rows, *results.wait()))
                results.release(read=True)
                q_smem, *numbers = queries.wait()
                weights, bent = weigh(rows, step, q_smem, *numbers)
                d_scores = gpu_scores.gradient(weights, more, bent)
                hopper.weigh(sums[0], d_scores.astype(_BF16), q_smem, *spare)
                plgpu.wgmma_wait(0)
                queries.release(read=True)

            def of_head(turn, _):
                lax.fori_loop(tile.edges(0), tile.edges(1),
                              functools.partial(add_values if values else add_keys, turn), None)

            lax.fori_loop(0, plan.G, of_head, None)
            return [x[...] for x in sums]

        return pl.run_scoped(sum_up, *(plgpu.ACC((HALF, width), _F32) for width in shapes))

    outs = [jax.ShapeDtypeStruct((*k.shape[:3], width), _BF16) for width in shapes]
    edges = table.queries // (size // STEP)  # of two steps of STEP each in any case
    return gpu_tiles.over_tiles(
        attend, edges, [*fixed, *others], [*first, *last], outs, turns=plan.G,
        scalars=[table.first], scratch=gpu_scores.spare(shape) * len(shapes), registers=(24, 240),
        size=size, late=len(last))
