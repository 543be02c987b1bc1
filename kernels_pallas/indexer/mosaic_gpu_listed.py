"""The indexer's divergence over listed keys on a GPU's tensor cores, forward and backward.

As in token_sparse, a chunk's keys are gathered by XLA in the order in which the kernels read them,
and each of a program's two multiplying warpgroups has a query of its own. Keys are the rows of its
products and heads their columns, so that the sum over heads goes along a row. The kernels give the
scores, and the gradients for given gradients of the scores; the softmax over a list is XLA's.

With e[n, j] = d_score[n] where q[j].k[n] is above 0, and 0 elsewhere: dk[n] = sum_j e[n, j] w[j]
q[j], and of u[j] = sum_n e[n, j] k[n] come dq[j] = w[j] u[j] and dw[j] = q[j].u[j], both times the
scale. So no number for every head and key leaves the kernel. That is Hopper's;
mosaic_gpu_listed_blackwell.py has the kernels for Blackwell, and what is around them is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, rows
from kernels_pallas.indexer import xla, xla_listed
from kernels_pallas.indexer.gpu_plan import HALF
from kernels_pallas.token_sparse import chunks, gpu_tiles, mosaic_gpu_bwd
from kernels_pallas.token_sparse.gpu_plan import Plan, plan_of

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SHAPE = (HALF, HALF)


def raw_products(q_smem, k_smem):
    """Products of 64 keys with 64 heads."""
    def product(acc):
        plgpu.wgmma(acc, k_smem, q_smem.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(_SHAPE, _F32))


def _score_tiles(plan: Plan, q, w, keys):
    """Return the score of every gathered key [Z x steps x X]."""
    def attend(by_row, steps, emit, _):
        q_smem, w_smem = by_row
        weights = plgpu.load(w_smem, layout=_COLUMN)

        def step(c, _):
            def part(k_smem):
                hits = jnp.maximum(raw_products(q_smem, k_smem), 0)
                return (hits * hopper.spread(weights, _SHAPE, 1)).sum(axis=1)

            emit(c, [steps(c, part)])

        lax.fori_loop(0, plan.steps, step, None)
        return []

    part_outs = [gpu_tiles.result(plan, (), _F32, by_step=True)]
    return gpu_tiles.over_tiles(plan, attend, [q, w], [keys], [], part_outs=part_outs)[0]


def _gradient_tiles(plan: Plan, q, weighted, keys, d_score):
    """Return u [Z x 2 x kept, D] and the gradient of every gathered key [Z x steps x X, D]."""
    def attend(by_row, steps, emit, memory):
        q_smem, weighted_smem = by_row
        (e_smem,) = memory

        def sum_up(u):
            def step(c, _):
                def part(k_smem, d_score_smem):
                    raw = raw_products(q_smem, k_smem)
                    slope = hopper.spread(plgpu.load(d_score_smem, layout=_ROW), _SHAPE, 0)
                    e_smem[...] = jnp.where(raw > 0, slope, jnp.zeros_like(slope)).astype(_BF16)
                    plgpu.commit_smem()
                    plgpu.wgmma(u, e_smem.transpose((1, 0)), k_smem)

                    def gradient(acc):
                        plgpu.wgmma(acc, e_smem, weighted_smem)
                        return acc[...]  # and all before is done

                    return pl.run_scoped(gradient, plgpu.ACC((HALF, plan.D), _F32))

                emit(c, [steps(c, part)])

            lax.fori_loop(0, plan.steps, step, None)
            return u[...]

        return [pl.run_scoped(sum_up, plgpu.ACC((HALF, plan.D), _F32))]

    return gpu_tiles.over_tiles(
        plan, attend, [q, weighted], [keys, d_score],
        [gpu_tiles.result(plan, (plan.D,), _BF16)], scratch=[_SHAPE],
        part_outs=[gpu_tiles.result(plan, (plan.D,), _BF16, by_step=True)])


# Around the kernels.


class Kernels(NamedTuple):
    """A generation's scores and gradients of gathered keys, and sums of gradients by key."""

    scores: Callable[..., Any]
    gradients: Callable[..., Any]
    add_up: Callable[..., Any]


_HOPPER = Kernels(_score_tiles, _gradient_tiles, mosaic_gpu_bwd.add_up)


def _heads(plan: Plan, w):
    """The heads' weights with the scale in them."""
    return w.astype(_F32) * plan.scale


def _forward(kernels: Kernels, plan: Plan, q, k, w, at, mass):
    """Return the loss [B, L] and the scores [B, L, N]."""
    table = chunks.table(plan, k)

    def chunk(_, x):
        q, w, at, mass = x
        found = kernels.scores(plan, gpu_tiles.by_tile(plan, q),
                               gpu_tiles.by_tile(plan, _heads(plan, w)),
                               rows.read(table, gpu_tiles.in_steps(plan, at)))
        listed = at < plan.B * plan.S
        scores = jnp.where(listed, gpu_tiles.of_steps(plan, found), xla.NOTHING)
        return None, (xla_listed.divergence(scores, mass, listed), scores)

    xs = [(q, 0), (w, 0), (at, plan.B * plan.S), (mass, 0)]
    return chunks.scan(plan, chunk, None, xs)[1]


def _backward(kernels: Kernels, plan: Plan, kept, cotangent):
    q, k, w, at, mass, scores = kept
    table = chunks.table(plan, k)

    def chunk(d_table, x):
        q, w, at, mass, scores, g = x
        slope = xla_listed.slope(scores, mass, at < plan.B * plan.S) * g[:, None]
        weighted = (q.astype(_F32) * _heads(plan, w)[..., None]).astype(_BF16)
        order = gpu_tiles.in_steps(plan, at)
        widths = ((0, plan.pair * plan.tiles - slope.shape[0]), (0, plan.steps * HALF - plan.N))
        slope = jnp.pad(slope, widths).reshape(plan.tiles, plan.pair, plan.steps, HALF)
        u, d_keys = kernels.gradients(
            plan, gpu_tiles.by_tile(plan, q), gpu_tiles.by_tile(plan, weighted),
            rows.read(table, order), slope.swapaxes(1, 2).reshape(-1))
        d_table += kernels.add_up(d_keys, order, d_table.shape[0])
        u = gpu_tiles.of_tiles(plan, u)[..., :plan.Dk].astype(_F32)
        dq = (u * _heads(plan, w)[..., None]).astype(_BF16)
        dw = ((q.astype(_F32) * u).sum(-1) * plan.scale).astype(_BF16)
        return d_table, (dq, dw)

    d_table = jnp.zeros((mosaic_gpu_bwd.whole(plan.B * plan.S), plan.D), _F32)
    d_table, (dq, dw) = chunks.scan(plan, chunk, d_table, [
        (q, 0), (w, 0), (at, plan.B * plan.S), (mass, 0), (scores, xla.NOTHING),
        (cotangent.astype(_F32), 0)])
    dk = d_table[:plan.B * plan.S, :plan.Dk].reshape(k.shape)
    return dq, dk.astype(k.dtype), dw, None, None


def comparing(kernels: Kernels):
    """Return index_kl_listed of a generation's kernels."""
    return xla_listed.diverging(functools.partial(_forward, kernels),
                                functools.partial(_backward, kernels), plan_of)


index_kl_listed = comparing(_HOPPER)
