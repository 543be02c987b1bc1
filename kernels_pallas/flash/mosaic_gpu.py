"""Attention on a GPU's tensor cores: bfloat16, accumulated in float32.

The kernels here are Hopper's; Blackwell's, in mosaic_gpu_blackwell.py, share all around them. A
warpgroup multiplies 64 queries with 128 keys at a time, or with 64 where registers hold no more:
128 keys are read once for twice the products, and both sides of a product of 64 x 64 take all that
shared memory gives. Forward the two warpgroups take turns, so that one bends its scores while the
other multiplies. Which keys are met, and what masks them, is in gpu_plan.py. Only o and the
logarithm of the softmax's denominator are kept. The gradients are made by tiles of queries and by
tiles of keys, each of which adds up in registers and in one order: nothing is added to memory, and
the same bits come every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.flash import gpu_plan, gpu_scores, gpu_tiles, mosaic_gpu_bwd, pairs
from kernels_pallas.flash.gpu_plan import EMPTY, HALF, LOG2E, NOTHING, STEP, Plan
from kernels_pallas.flash.gpu_scores import COLUMN, ROW
from kernels_pallas.flash.table import Table, table_of

_F32, _BF16 = jnp.float32, jnp.bfloat16
WIDE = (HALF, 2 * STEP)  # scores of a step forward


def phases(plan: Plan):
    """Return (first edge, last edge, masked) of the runs of steps that a tile of queries meets."""
    if plan.marked:
        return ((0, 3, True),)
    runs = ((0, 1, True), (1, 2, False), (2, 3, True))
    return runs if plan.position.window is not None else runs[1:]


def _met(plan: Plan, tile, first, found, masked, own, ends, others, shape):
    """Scores of a step, NOTHING where a query does not see a key."""
    if not masked:
        return found
    own, others = (plgpu.load(x[0], layout=layout) if x else None
                   for x, layout in ((own, ROW), (others, COLUMN)))
    ends = plgpu.load(ends, layout=COLUMN)
    may = gpu_scores.seen(plan, first, tile.row, ends, own, others, shape=shape)
    return jnp.where(may, found, NOTHING)


def own_of(plan: Plan, table: Table):
    """Return the numbers of queries that mask, which lie in memory with them."""
    return [table.own] if plan.segmented else []


def others_of(plan: Plan, table: Table):
    """Return the numbers of keys that mask."""
    return [table.ends, *([table.others] if plan.segmented else [])]


def _forward_tiles(plan: Plan, table: Table, q, k, v, sinks):
    """Return o [B, L, H, V] and lse [B, H, L], to base 2 as the sinks are, which are in it."""
    result = (HALF, plan.V)

    def attend(tile, head, stream, scalars, spare):
        first_gmem, sinks_gmem = scalars

        def later(masked, step, old):
            (q_smem, *own), keys, values = stream(0, step)
            k_smem, ends, *others = keys.wait()
            raw = gpu_scores.product(q_smem, k_smem, WIDE, tile.turn)
            found, _ = gpu_scores.scores(plan, raw)
            found = _met(plan, tile, first_gmem[0], found, masked, own, ends, others, WIDE)
            keys.release(read=masked)
            top = jnp.maximum(old[0], found.max(axis=1))
            weights = jnp.exp2(found - hopper.spread(top, WIDE, 0))
            shrink = jnp.exp2(old[0] - top)
            total = old[1] * shrink + weights.sum(axis=1)
            o = old[2] * hopper.spread(shrink, result, 0)
            # all of it before the other warpgroup's turn to bend
            top, total, o, weights = lax.optimization_barrier(
                (top, total, o, weights.astype(_BF16)))
            tile.turn()
            (v_smem,) = values.wait()

            def weigh(acc):
                hopper.weigh(acc, weights, v_smem, *spare)
                plgpu.wgmma_wait(0)

            o = hopper.onto(o, weigh)
            values.release()
            return top, total, o

        def start(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, _F32), layout)

        state = (start((HALF,), EMPTY, ROW), start((HALF,), 0, ROW),
                 start(result, 0, plgpu.Layout.WGMMA))
        for low, high, masked in phases(plan):
            state = lax.fori_loop(tile.edges(low), tile.edges(high),
                                  functools.partial(later, masked), state)
        top, total, o = state
        sink = sinks_gmem[head[1]]
        highest = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - highest)
        total = total * shrink + jnp.exp2(sink - highest)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, highest + jnp.log(total) * LOG2E, NOTHING)
        return o * hopper.spread(shrink / total, result, 0), lse

    outs = [jax.ShapeDtypeStruct((*q.shape[:3], plan.V), _BF16),
            jax.ShapeDtypeStruct((plan.B, plan.H, plan.L), _F32)]
    return gpu_tiles.over_tiles(attend, gpu_plan.of_wide(table.keys), [q, *own_of(plan, table)],
                                [k, *others_of(plan, table), v], outs, heads=plan.G,
                                scalars=[table.first, sinks], scratch=gpu_scores.spare(WIDE),
                                size=2 * STEP, late=1, alternate=True)


def _query_gradient_tiles(plan: Plan, table: Table, q, do, lse, delta, k, v):
    """Return dq / scale [B, L, H, D]; lse is to base 2, 1e30 for a row that sees nothing."""
    shape, edges = (HALF, plan.step), table.keys
    others = others_of(plan, table)
    if plan.step > STEP:
        edges = gpu_plan.of_wide(edges)

    def attend(tile, _, stream, scalars, spare):
        (first_gmem,) = scalars
        less, delta = (plgpu.load(x, layout=ROW) for x in tile.rows[2:4])

        def sum_up(dq):
            def later(masked, step, _):
                (q_smem, do_smem, _, _, *own), values, keys = stream(0, step)
                more = gpu_scores.product(do_smem, *values.wait(), shape)
                values.release()
                k_smem, ends, *others = keys.wait()
                found, bent = gpu_scores.scores(plan, gpu_scores.product(q_smem, k_smem, shape))
                found = _met(plan, tile, first_gmem[0], found, masked, own, ends, others, shape)
                weights = jnp.exp2(found - hopper.spread(less, shape, 0))
                more = more - hopper.spread(delta, shape, 0)
                d_scores = gpu_scores.gradient(weights, more, bent)
                hopper.weigh(dq, d_scores.astype(_BF16), k_smem, *spare)
                plgpu.wgmma_wait(0)
                keys.release(read=masked)

            for low, high, masked in phases(plan):
                lax.fori_loop(tile.edges(low), tile.edges(high),
                              functools.partial(later, masked), None)
            return dq[...]

        return [pl.run_scoped(sum_up, plgpu.ACC((HALF, plan.D), _F32))]

    outs = [jax.ShapeDtypeStruct(q.shape, _BF16)]
    return gpu_tiles.over_tiles(attend, edges, [q, do, lse, delta, *own_of(plan, table)],
                                [v, k, *others], outs, heads=plan.G, scalars=[table.first],
                                scratch=gpu_scores.spare(shape), size=plan.step,
                                late=1 + len(others))[0]


# Around the kernels.


class Kernels(NamedTuple):
    """A generation's three kernels."""

    forward: Callable[..., Any]
    query_gradient: Callable[..., Any]
    key_gradients: Callable[..., Any]
    tall: int = gpu_plan.X  # rows of a tile of queries forward


_HOPPER = Kernels(_forward_tiles, _query_gradient_tiles, mosaic_gpu_bwd.key_gradients)


def _laid(x, rows, width):
    """Fill up [B, rows, heads, width] with zeros."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, width - x.shape[3])))


def _by_head(plan: Plan, x, fill=0):
    """Numbers [B, L, H] as [B, H, L in memory]."""
    widths = ((0, 0), (0, 0), (0, plan.L - x.shape[1]))
    return jnp.pad(x.swapaxes(1, 2), widths, constant_values=fill)


def _in_memory(plan: Plan, q, k, v):
    return (_laid(q, plan.L, plan.D), _laid(k, plan.S, plan.D), _laid(v, plan.S, plan.V))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, plan, q, k, v, marks, sinks):
    return _forward(kernels, plan, q, k, v, marks, sinks)


def _forward(kernels: Kernels, plan: Plan, q, k, v, marks, sinks):
    """Return o [B, L, H, Dv] and lse [B, L, H]."""
    table, L = table_of(plan, marks), q.shape[1]
    sinks = jnp.full(plan.H, NOTHING, _F32) if sinks is None else sinks.astype(_F32) * LOG2E
    q, k, v = _in_memory(plan, q, k, v)
    o, lse = kernels.forward(plan, table, q, k, v, sinks)
    lse = lse[:, :, :L].swapaxes(1, 2)
    return o[:, :L, :, :plan.Dv], jnp.where(lse > EMPTY, lse * (1 / LOG2E), NOTHING)


def _attend_forward(kernels, plan, q, k, v, marks, sinks):
    o, lse = _forward(kernels, plan, q, k, v, marks, sinks)
    return (o, lse), (q, k, v, marks, sinks, o, lse)


def _attend_backward(kernels: Kernels, plan: Plan, kept, cotangents):
    (q, k, v, marks, sinks, o, lse), (do, d_lse) = kept, cotangents
    delta = (do.astype(_F32) * o.astype(_F32)).sum(-1) - d_lse
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(_F32)[None, None] - jnp.where(lse > EMPTY, lse, -NOTHING))
        d_sinks = -(weight * delta).sum((0, 1)).astype(sinks.dtype)
    table, (L, S), Dk = table_of(plan, marks), (q.shape[1], k.shape[1]), plan.Dk
    less = _by_head(plan, jnp.where(lse > EMPTY, lse * LOG2E, -NOTHING), -NOTHING)
    rows = (_laid(do, plan.L, plan.V), less, _by_head(plan, delta))
    q, k, v = _in_memory(plan, q, k, v)
    dq = kernels.query_gradient(plan, table, q, *rows, k, v)
    dk, dv = kernels.key_gradients(plan, table, q, *rows, k, v)
    dq, dk = (x[:, :n, :, :Dk].astype(_F32) * plan.position.scale for x, n in ((dq, L), (dk, S)))
    return dq.astype(_BF16), dk.astype(_BF16), dv[:, :S, :, :plan.Dv], None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
          causal=True, window=None, softcap=None, sinks_H=None, ends_BxS=None, stride=1, span=1,
          return_lse=False, block_q=None, block_k=None, first=None, kernels=_HOPPER):
    """Attend tile by tile; the block sizes mean nothing here."""
    del block_q, block_k
    strided = ends_BxS is not None or (stride, span) != (1, 1)
    offset = 0 if strided or first is not None else k_BxSxKxDk.shape[1] - q_BxLxHxDk.shape[1]
    marks = pairs.Marks(segments_q, segments_k, ends_BxS,
                        None if first is None else jnp.asarray(first, jnp.int32))
    plan = gpu_plan.plan_of(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, marks, scale=float(scale),
                            causal=causal, window=window, softcap=softcap, stride=stride,
                            span=span, offset=offset, tall=kernels.tall)
    o, lse = _attend(kernels, plan, q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, marks, sinks_H)
    return (o, lse) if return_lse else o
