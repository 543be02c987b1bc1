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
from kernels_pallas.flash.gpu_plan import HALF, STEP, Plan, Table
from kernels_pallas.flash.gpu_scores import COLUMN, ROW, SHAPE

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

    def attend(tile, _, rows, stream, scalars, spare):
        del rows
        (first_gmem,) = scalars

        def sum_up(*sums):
            def later(turn, step, _):
                def part(rows, q_smem, do_smem, lse_smem, delta_smem, *own_smem):
                    k_smem, *v_smem = rows[:len(fixed)]
                    ends_smem, *others_smem = rows[len(fixed):]
                    # One product after the other, and weights kept in bfloat16: beside two sums
                    # registers have room for no more.
                    found, bent = gpu_scores.scores(plan, gpu_scores.product(k_smem, q_smem))
                    segments = [plgpu.load(x[0], layout=layout) if x else None
                                for x, layout in ((own_smem, COLUMN), (others_smem, ROW))]
                    may = gpu_scores.seen(
                        plan, first_gmem[0], step * STEP, plgpu.load(ends_smem, layout=ROW),
                        *segments, by_key=True)
                    less = hopper.spread(plgpu.load(lse_smem, layout=COLUMN), SHAPE, 1)
                    weights = jnp.where(may, jnp.exp2(found - less), 0.0).astype(_BF16)
                    if values:
                        hopper.weigh(sums[-1], weights, do_smem, *spare[-1:])
                    if keys:
                        less = hopper.spread(plgpu.load(delta_smem, layout=COLUMN), SHAPE, 1)
                        more = gpu_scores.product(v_smem[0], do_smem) - less
                        d_scores = gpu_scores.gradient(weights.astype(_F32), more, bent)
                        hopper.weigh(sums[0], d_scores.astype(_BF16), q_smem, *spare[:1])
                    plgpu.wgmma_wait(0)

                stream(turn, step, part)

            def of_head(turn, _):
                lax.fori_loop(tile.edges(0), tile.edges(1), functools.partial(later, turn), None)

            lax.fori_loop(0, plan.G, of_head, None)
            return [x[...] for x in sums]

        return pl.run_scoped(sum_up, *(plgpu.ACC((HALF, width), _F32) for width in shapes))

    outs = [jax.ShapeDtypeStruct((*k.shape[:3], width), _BF16) for width in shapes]
    return gpu_tiles.over_tiles(
        attend, table.queries, [*fixed, *others], [q, do, lse, delta, *own], outs, turns=plan.G,
        scalars=[table.first], scratch=gpu_scores.spare() * len(shapes), registers=(24, 240))
