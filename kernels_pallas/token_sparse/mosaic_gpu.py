"""Attention to listed tokens on the tensor cores of Hopper and Blackwell: bfloat16, float32 sums.

Hopper's copy engine takes no lists, so a chunk's tokens are gathered first, in the order in which
the kernels read them. Each of the two multiplying warpgroups of a program has a query of its own:
its heads are the rows of the products, filled up to 64, its tokens their columns. Keys are values
too, all of their dims, of which the first v_dim are kept. The gradient of the tokens is computed by
query and added up by token in mosaic_gpu_bwd.py.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import generation, halves, hopper, rows
from kernels_pallas.token_sparse import chunks, gpu_tiles, mosaic_gpu_bwd
from kernels_pallas.token_sparse.gpu_plan import EMPTY, HALF, LOG2E, NOTHING, Plan, plan_of

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SHAPE = (HALF, HALF)


def _forward_tiles(plan: Plan, q, kv, bias):
    """Return o [Z x 2 x kept, D] and lse [Z x 2 x kept]."""
    factor = plan.scale * LOG2E

    result = (HALF, plan.D)
    products = halves.products(_SHAPE, result)

    def attend(by_row, keys, _, spare, own):
        (q_smem,) = by_row

        def part(kv_smem, bias_smem, old=None):
            def score(acc):
                own.multiply(acc, q_smem, kv_smem.transpose((1, 0)))
                return own.read(acc)

            raw = own.scoped(score, 0)
            bias = plgpu.load(bias_smem, layout=_COLUMN)
            scores = raw * factor + hopper.spread(bias, _SHAPE, 1)
            top = jnp.maximum(scores.max(axis=1), EMPTY if old is None else old[0])
            weights = jnp.exp2(scores - hopper.spread(top, _SHAPE, 0))
            total = weights.sum(axis=1)

            def weigh(acc):
                own.weigh(acc, weights, kv_smem, spare)
                return own.read(acc)

            o = own.scoped(weigh, 1)
            if old is None:
                return top, total, o
            shrink = jnp.exp2(old[0] - top)
            return top, old[1] * shrink + total, old[2] * hopper.spread(shrink, result, 0) + o

        def later(c, old):
            return keys(c, functools.partial(part, old=old))

        top, total, o = lax.fori_loop(1, plan.steps, later, keys(0, part))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), NOTHING)
        return o / hopper.spread(total, result, 0), lse

    outs = [gpu_tiles.result(plan, (plan.D,), _BF16), gpu_tiles.result(plan, (), _F32)]
    return gpu_tiles.over_tiles(plan, attend, [q], [kv, bias], outs, products=products,
                                scratch=products.spare(_SHAPE))


def _backward_tiles(plan: Plan, q, do, lse2, delta, kv, bias):
    """Return dq [Z x 2 x kept, D] and the gradient of every gathered token [Z x steps x X, D].

    `lse2` is to base 2, 1e30 for rows that see nothing; `do` is filled up with zeros to D.
    """
    factor = plan.scale * LOG2E

    result = (HALF, plan.D)

    def attend(by_row, keys, emit, memory, own):
        q_smem, do_smem, lse_smem, delta_smem = by_row
        weights_smem, d_scores_smem = memory
        less, delta = (plgpu.load(x, layout=_ROW) for x in (lse_smem, delta_smem))

        def sum_up(dq):
            def step(c, _):
                def part(kv_smem, bias_smem):
                    def both(score, d_weight):
                        own.multiply(score, q_smem, kv_smem.transpose((1, 0)))
                        own.multiply(d_weight, do_smem, kv_smem.transpose((1, 0)))
                        raw = own.read(score, pending=1)
                        bias = plgpu.load(bias_smem, layout=_COLUMN)
                        scores = raw * factor + hopper.spread(bias, _SHAPE, 1)
                        weights = jnp.exp2(scores - hopper.spread(less, _SHAPE, 0))
                        more = own.read(d_weight, known=True) - hopper.spread(delta, _SHAPE, 0)
                        return weights, weights * more * plan.scale

                    weights, d_scores = own.scoped(both, 0, 1)
                    weights_smem[...] = weights.astype(_BF16)
                    d_scores_smem[...] = d_scores.astype(_BF16)
                    plgpu.commit_smem()
                    own.multiply(dq, d_scores_smem, kv_smem, more=c > 0)

                    def gradient(acc):
                        own.multiply(acc, d_scores_smem.transpose((1, 0)), q_smem)
                        own.multiply(acc, weights_smem.transpose((1, 0)), do_smem, more=True)
                        return own.read(acc)

                    return own.scoped(gradient, 3)

                emit(c, [keys(c, part)])

            lax.fori_loop(0, plan.steps, step, None)
            return own.read(dq)

        return [own.scoped(sum_up, 2)]

    return gpu_tiles.over_tiles(
        plan, attend, [q, do, lse2, delta], [kv, bias],
        [gpu_tiles.result(plan, (plan.D,), _BF16)], scratch=[_SHAPE, _SHAPE],
        products=halves.products(_SHAPE, _SHAPE, result, result),
        part_outs=[gpu_tiles.result(plan, (plan.D,), _BF16, by_step=True)])


def _mass_tiles(plan: Plan, q, lse2, kv):
    """Return the weight of every gathered token, summed over heads [Z x steps x X]."""
    factor = plan.scale * LOG2E

    def attend(by_row, keys, emit, _, own):
        q_smem, lse_smem = by_row
        less = plgpu.load(lse_smem, layout=_COLUMN)

        def step(c, _):
            def part(kv_smem):
                def score(acc):
                    own.multiply(acc, kv_smem, q_smem.transpose((1, 0)))
                    return own.read(acc)

                raw = own.scoped(score, 0)
                return jnp.exp2(raw * factor - hopper.spread(less, _SHAPE, 1)).sum(axis=1)

            emit(c, [keys(c, part)])

        lax.fori_loop(0, plan.steps, step, None)
        return []

    part_outs = [gpu_tiles.result(plan, (), _F32, by_step=True)]
    return gpu_tiles.over_tiles(plan, attend, [q, lse2], [kv], [], part_outs=part_outs,
                                products=halves.products(_SHAPE))[0]


# Around the kernels.


def _wide():
    """The kernels for wide latents and many heads."""
    return generation.kernels("kernels_pallas.token_sparse", "mosaic_gpu_wide")


def _bias(plan: Plan, at):
    """0 for a token and NOTHING for none."""
    return jnp.where(at < plan.B * plan.S, 0, NOTHING).astype(_F32)


def _forward_chunk(plan: Plan, table, _, chunk):
    q, at = chunk
    at = gpu_tiles.in_steps(plan, at)
    run = _wide().forward_tiles if plan.wide else _forward_tiles
    o, lse = run(plan, gpu_tiles.by_tile(plan, q), rows.read(table, at), _bias(plan, at))
    return None, (gpu_tiles.of_tiles(plan, o)[..., :plan.v_dim], gpu_tiles.of_tiles(plan, lse))


def _backward_chunk(plan: Plan, table, d_table, chunk):
    q, do, lse2, delta, at = chunk
    at = gpu_tiles.in_steps(plan, at)
    run = _wide().backward_tiles if plan.wide else _backward_tiles
    by_tile = functools.partial(gpu_tiles.by_tile, plan)
    dq, d_tokens = run(plan, by_tile(q), by_tile(do), by_tile(lse2, -NOTHING), by_tile(delta),
                       rows.read(table, at), _bias(plan, at))
    sums = generation.kernels("kernels_pallas.token_sparse", "mosaic_gpu_bwd")
    d_table += sums.add_up(d_tokens, at, d_table.shape[0])
    return d_table, gpu_tiles.of_tiles(plan, dq)[..., :plan.Dk]


def _forward(plan: Plan, q, kv, at):
    step = functools.partial(_forward_chunk, plan, chunks.table(plan, kv))
    return chunks.scan(plan, step, None, [(q, 0), (at, plan.B * plan.S)])[1]


def _base2(lse):
    """To base 2, and 1e30 for a row that sees nothing, whose weights are then 0."""
    return jnp.where(lse < EMPTY, -NOTHING, lse * LOG2E)


def _backward(plan: Plan, q, kv, at, lse, delta, do):
    step = functools.partial(_backward_chunk, plan, chunks.table(plan, kv))
    d_table = jnp.zeros((mosaic_gpu_bwd.whole(plan.B * plan.S), plan.D), _F32)
    d_table, dq = chunks.scan(plan, step, d_table, [
        (q, 0), (do, 0), (_base2(lse), -NOTHING), (delta, 0), (at, plan.B * plan.S)])
    d_kv = d_table[:plan.B * plan.S, :plan.Dk].reshape(kv.shape)
    return dq, d_kv.astype(kv.dtype)


token_sparse = chunks.attention(_forward, _backward, plan_of)


def token_mass(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, lse_BxLxH, *, scale):
    """Weigh query by query."""
    q, kv, lse = lax.stop_gradient((q_BxLxHxDk, kv_BxSxDk, lse_BxLxH))
    (B, L), S, N = q.shape[:2], kv.shape[1], chosen_BxLxN.shape[2]
    if 0 in (B, L, S, N):
        return jnp.zeros((B, L, N), _F32)
    plan, at = plan_of(q, kv, chosen_BxLxN, v_dim=1, scale=scale), rows.numbered(chosen_BxLxN, S)
    table = chunks.table(plan, kv)

    def chunk(_, x):
        q, lse2, at = x
        run = _wide().mass_tiles if plan.wide else _mass_tiles
        found = run(plan, gpu_tiles.by_tile(plan, q), gpu_tiles.by_tile(plan, lse2, -NOTHING),
                    rows.read(table, gpu_tiles.in_steps(plan, at)))
        return None, jnp.where(at < plan.B * plan.S, gpu_tiles.of_steps(plan, found), 0)

    xs = [(q, 0), (_base2(lse.astype(_F32)), -NOTHING), (at, B * S)]
    return chunks.scan(plan, chunk, None, xs)[1]
