"""Attention to chosen blocks on Hopper's tensor cores: bfloat16, accumulated in float32.

A kernel multiplies a tile of 128 query rows with its block; by_block.py makes the tiles and merges
what they give. One warpgroup of a program copies, two multiply, 64 rows each. The gradient of the
keys is in mosaic_gpu_bwd.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.block_sparse import by_block, mosaic_gpu_bwd
from kernels_pallas.block_sparse.plan import HALF, LOG2E, Plan, X, plan_of

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


def _backward_tiles(plan: Plan, q, do, lse, delta, found, k, v):
    lse2 = lse * LOG2E
    dq = _query_gradient_tiles(plan, q, do, lse2, delta, found, k, v)
    return dq, mosaic_gpu_bwd.key_gradients(plan, found, q, do, lse2, delta, k, v)


_KERNELS = by_block.Kernels(_forward_tiles, _backward_tiles)


def block_sparse(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, *, block, scale,
                 return_lse=False, kernels=_KERNELS):
    """Attend tile by tile."""
    arrays = (q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM)
    o, lse = by_block.attend(kernels, plan_of(*arrays, block=block, scale=scale), *arrays)
    return (o, lse) if return_lse else o
