"""Attention to listed tokens in a latent wider than 128, or of more than 64 heads, on Hopper.

A program takes one query and 64 of its heads at a time. Its two multiplying warpgroups score half
of each 64 tokens, meet, and own half of the result's columns: a result 512 wide does not fit into
the registers of one. Weights pass through shared memory, in rows of 64 bytes, so that each writes
32 tokens of them; results leave by the memory that held the queries. Gradients of the tokens are a
plain product of the weights and their gradients with queries and results' gradients, by query.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.token_sparse.gpu_plan import EMPTY, HALF, LOG2E, NOTHING, Plan

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
QUARTER = 32  # tokens that a warpgroup scores at once
_SCORES = (HALF, QUARTER)
_SLOTS = 3  # of tokens, where they fit
_BARRIERS = 256  # bytes
# Columns of the queries' gradient that two warpgroups' registers sum; of a wider one XLA makes the
# rest, DeepSeek's 64 rotary ones, of d_scores that the kernel writes anyway.
SUMMED = 512
_PARAMS = {field.name for field in dataclasses.fields(plgpu.CompilerParams)}  # of this JAX


def _memory(shape):
    """Shared memory of bfloat16 in rows of 64 bytes, 32 columns."""
    return plgpu.SMEM(shape, _BF16, transforms=(plgpu.TilingTransform((8, QUARTER)),
                                                plgpu.SwizzleTransform(64)))


def _half(ref, width, warpgroup):
    """Return a warpgroup's half of the first `width` columns."""
    return ref.at[:, pl.ds(pl.multiple_of(warpgroup * (width // 2), QUARTER), width // 2)]


@dataclasses.dataclass(frozen=True)
class _Only(hopper.Ring):
    """A ring of one slot, which on Blackwell the compiler is not told."""

    zero: Any = None

    def slot(self, count):
        return super().slot(count) if self.zero is None else count & self.zero


def over_tiles(plan: Plan, attend, by_row, keyed, outs, *, shared=(), numbers=0, products=None):
    """A kernel that calls `attend` in both multiplying warpgroups for each query and 64 heads.

    `by_row` are arrays by row of the tiles, [Z x 64, ...], of which one tile is in memory; `keyed`
    by token, [chunk x steps x 64, ...]; `shared` shapes of bfloat16 memory that the warpgroups
    share, and `numbers` how many times 64 float32. Whatever is float32 lies in one buffer, since
    each buffer begins at a whole kilobyte.
    attend(tile, warpgroup, rows, keys, outs, numbers, meet) writes to `outs` itself and returns
    when what it wrote has left the memory of the rows; keys(c, use) returns
    use([*wide rows, *shared], *keyed) of step c, and meet() waits until both warpgroups have come
    there. With Blackwell's `products` it and `use` are given the warpgroup's, last.
    """
    tiles, steps = plan.tiles * plan.sets, plan.steps

    def wide(arrays):
        return [(HALF, x.shape[1]) for x in arrays if x.ndim == 2]

    def size(shapes):
        return sum(2 * math.prod(shape) for shape in shapes)

    def narrow(arrays):
        return sum(x.ndim == 1 for x in arrays)

    fixed = size(wide(by_row)) + size(shared) + 4 * HALF * (narrow(by_row) + numbers)
    per_slot = size(wide(keyed)) + 4 * HALF * narrow(keyed)
    slots = min((hopper.SHARED - _BARRIERS - fixed) // per_slot, _SLOTS)
    assert slots >= 1, f"{fixed} bytes and {per_slot}"

    def body(zero_gmem, *refs, rows_smem, keyed_smem, shared_smem, numbers_smem, rows_bar,
             keys_bar, meet_bar, sums=None):
        zero, ends = zero_gmem[0], [len(by_row), len(by_row) + len(keyed)]
        rows_gmem, keyed_gmem = refs[:ends[0]], refs[ends[0]:ends[1]]
        outs_gmem = refs[ends[1]:]
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        cores = device.target().cores
        key_ring = hopper.Ring(*keys_bar, slots)
        share = hopper.share(hopper.i32(tiles))
        extra = numbers_smem.at[pl.ds(0, numbers)]
        after = iter(range(numbers, numbers + narrow(by_row)))
        memory = iter(rows_smem)
        rows = [next(memory).at[0] if x.ndim == 2 else numbers_smem.at[next(after)]
                for x in by_row]

        def known():
            if not products:
                return zero, warpgroup, share, _Only(*rows_bar, 1)
            # What a branch works out anew is not spilled for lack of registers in the other.
            again = zero_gmem[0]
            return (again, lax.axis_index("warpgroup"), hopper.share(hopper.i32(tiles)),
                    _Only(*rows_bar, 1, again))

        def of_slot(slot, c, zero):
            # Of memory known before the loop over c the compiler works out the address of every
            # operand ahead, 64 bits each, and spills them: it is not told that c & zero is 0.
            slot = slot + (c & zero)
            memory, at = iter(keyed_smem), slot + (numbers + narrow(by_row))
            assert narrow(keyed) <= 1
            seen = [next(memory).at[slot] if x.ndim == 2 else numbers_smem.at[at] for x in keyed]
            return ([x.at[c & zero] for x in (*rows_smem, *shared_smem)], *seen)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(40 if products else 24, action="decrease")
            zero, _, share, row_ring = known()

            def fill(i, _):
                tile = core + i * cores
                slot = row_ring.acquire(i)
                for source, target in zip(rows_gmem, rows, strict=True):
                    plgpu.copy_gmem_to_smem(source.at[pl.ds(tile * HALF, HALF)], target,
                                            row_ring.full.at[slot])
                first = lax.div(tile, hopper.i32(plan.sets)) * steps

                def step(c, _):
                    slot = key_ring.acquire(i * steps + c)
                    part = pl.ds(pl.multiple_of((first + c) * HALF, HALF), HALF)
                    for source, target in zip(keyed_gmem, of_slot(slot, c, zero)[1:],
                                              strict=True):
                        plgpu.copy_gmem_to_smem(source.at[part], target, key_ring.full.at[slot])

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, share, fill, None)

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(232 if products else 240, action="increase")
            zero, warpgroup, share, row_ring = known()

            def meet():
                plgpu.barrier_arrive(meet_bar)
                plgpu.barrier_wait(meet_bar)

            def multiply(i, _):
                row_ring.wait(i)

                def keys(c, use):
                    count = i * steps + c
                    result = use(*of_slot(key_ring.wait(count), c, zero), *own(c))
                    key_ring.release(count)
                    return result

                def own(c):
                    return [products.of(sums, warpgroup, c & zero)] if products else []

                seen = rows
                if products:
                    memory = iter(rows_smem)
                    seen = [next(memory).at[i & zero] if x.ndim == 2 else row
                            for x, row in zip(by_row, rows, strict=True)]
                attend(core + i * cores, warpgroup, seen, keys, outs_gmem, extra, meet, *own(i))
                row_ring.release(i)

            lax.fori_loop(0, share, multiply, None)
            plgpu.wait_smem_to_gmem(0)

    memory = dict(
        rows_smem=[_memory((1, *shape)) for shape in wide(by_row)],
        keyed_smem=[_memory((slots, *shape)) for shape in wide(keyed)],
        shared_smem=[_memory((1, *shape)) for shape in shared],
        numbers_smem=plgpu.SMEM((numbers + narrow(by_row) + slots * narrow(keyed), HALF), _F32),
        rows_bar=hopper.barriers(len(by_row), 1),
        keys_bar=hopper.barriers(len(keyed), slots),
        meet_bar=plgpu.Barrier(num_arrivals=2) if products is None else None,
        sums=products.scratch() if products else None,
    )
    # Sums and maxima here go along rows, which warps do among themselves: no memory for them.
    params = {name: 0 for name in _PARAMS if name == "reduction_scratch_bytes"}
    return hopper.launch(body, outs, memory, **params)(jnp.zeros(1, jnp.int32), *by_row, *keyed)


def kept(plan: Plan) -> int:
    """Rows of a tile that are written."""
    return plan.kept // plan.sets


def send(plan: Plan, values, memory, target, tile, first):
    """Write these columns of a tile's result, from `first` on, by way of this memory."""
    columns = pl.ds(pl.multiple_of(first, QUARTER), values.shape[1])
    memory.at[:, columns][...] = values.astype(_BF16)
    plgpu.commit_smem()
    count = kept(plan)
    for row in range(0, count, 8):  # some columns of 8 rows are one piece of memory
        plgpu.copy_smem_to_gmem(memory.at[pl.ds(row, 8), columns],
                                target.at[pl.ds(tile * count + row, 8), columns],
                                commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def _pieces(width, most):
    """Return the columns of a warpgroup's half in parts that one product can have."""
    columns = width // 2
    parts = -(-columns // most)
    first = -(-columns // (parts * QUARTER)) * QUARTER
    return [min(first, columns - at) for at in range(0, columns, first)]


def forward_tiles(plan: Plan, q, kv, bias):
    """Return o [queries x kept, V] and lse [queries x kept]."""
    factor, V = plan.scale * LOG2E, plan.V
    pieces = _pieces(V, 128)

    def attend(tile, warpgroup, by_row, keys, outs, numbers, meet):
        (q_smem,), (o_gmem, lse_gmem) = by_row, outs
        top_smem, total_smem, lse_smem = numbers.at[0:2], numbers.at[2:4], numbers.at[4]
        mine = pl.ds(warpgroup * QUARTER, QUARTER)

        def step(c, old):
            def part(memory, kv_smem, bias_smem):
                own_q, weights_smem = memory

                def score(acc):
                    plgpu.wgmma(acc, own_q, kv_smem.at[mine].transpose((1, 0)))
                    return acc[...]

                raw = pl.run_scoped(score, plgpu.ACC(_SCORES, _F32))
                bias = plgpu.load(bias_smem.at[mine], layout=_COLUMN)
                scores = raw * factor + hopper.spread(bias, _SCORES, 1)
                top_smem.at[warpgroup][...] = scores.max(axis=1)
                plgpu.commit_smem()
                meet()  # both know the largest scores, and are done with the weights before
                tops = [plgpu.load(top_smem.at[n], layout=_ROW) for n in range(2)]
                top = jnp.maximum(old[0], jnp.maximum(*tops))
                weights = jnp.exp2(scores - hopper.spread(top, _SCORES, 0))
                _half(weights_smem, HALF, warpgroup)[...] = weights.astype(_BF16)
                plgpu.commit_smem()
                meet()  # both have written their weights
                shrink = jnp.exp2(old[0] - top)
                total = old[1] * shrink + weights.sum(axis=1)

                results, first = [], warpgroup * (V // 2)
                for o in old[2]:
                    columns = pl.ds(pl.multiple_of(first, QUARTER), o.shape[1])

                    def weigh(acc, columns=columns):
                        plgpu.wgmma(acc, weights_smem, kv_smem.at[:, columns])
                        plgpu.wgmma_wait(0)

                    results.append(hopper.onto(o * hopper.spread(shrink, o.shape, 0), weigh))
                    first += o.shape[1]
                return top, total, tuple(results)

            return keys(c, part)

        def start(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, _F32), layout)

        empty = (start((HALF,), EMPTY, _ROW), start((HALF,), 0, _ROW),
                 tuple(start((HALF, n), 0, plgpu.Layout.WGMMA) for n in pieces))
        top, total, o = lax.fori_loop(0, plan.steps, step, empty)
        total_smem.at[warpgroup][...] = total
        plgpu.commit_smem()
        meet()
        total = sum(plgpu.load(total_smem.at[n], layout=_ROW) for n in range(2))
        some = total > 0
        total = jnp.where(some, total, 1.0)

        @pl.when(warpgroup == 0)
        def _():
            lse_smem[...] = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), NOTHING)
            plgpu.commit_smem()
            count = kept(plan)
            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, count)],
                                    lse_gmem.at[pl.ds(tile * count, count)])

        first = warpgroup * (V // 2)
        for part in o:
            send(plan, part / hopper.spread(total, part.shape, 0), q_smem, o_gmem, tile, first)
            first += part.shape[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    rows = plan.tiles * plan.kept
    outs = [jax.ShapeDtypeStruct((rows, V), _BF16), jax.ShapeDtypeStruct((rows,), _F32)]
    return over_tiles(plan, attend, [q], [kv, bias], outs, shared=[(HALF, HALF)], numbers=5)


def _gradient_tiles(plan: Plan, q, do, lse2, delta, kv, bias):
    """Return dq [queries x kept, 512 of D] and, by tile, d_scores above weights [Z x 128, N]."""
    factor, W, V = plan.scale * LOG2E, min(plan.D, SUMMED), plan.V
    pieces = _pieces(W, 256)

    def attend(tile, warpgroup, by_row, keys, outs, _, meet):
        q_smem, _, lse_smem, delta_smem = by_row
        dq_gmem, weights_gmem = outs
        mine = pl.ds(warpgroup * QUARTER, QUARTER)

        def sum_up(*dq):
            def step(c, _):
                def part(memory, kv_smem, bias_smem):
                    own_q, own_do, d_scores_smem, weights_smem = memory
                    own = kv_smem.at[mine]

                    # One after the other, and weights kept in bfloat16: beside the sums
                    # registers have room for no more.
                    def product(a, b):
                        def of(acc):
                            plgpu.wgmma(acc, a, b.transpose((1, 0)))
                            return acc[...]

                        return pl.run_scoped(of, plgpu.ACC(_SCORES, _F32))

                    raw, less = product(own_q, own), plgpu.load(lse_smem, layout=_ROW)
                    bias = plgpu.load(bias_smem.at[mine], layout=_COLUMN)
                    scores = raw * factor + hopper.spread(bias, _SCORES, 1)
                    weights = jnp.exp2(scores - hopper.spread(less, _SCORES, 0)).astype(_BF16)
                    more = product(own_do, own.at[:, pl.ds(0, V)])
                    more -= hopper.spread(plgpu.load(delta_smem, layout=_ROW), _SCORES, 0)
                    d_scores = (weights.astype(_F32) * more * plan.scale).astype(_BF16)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    meet()  # neither reads what is to be overwritten
                    _half(weights_smem, HALF, warpgroup)[...] = weights
                    _half(d_scores_smem, HALF, warpgroup)[...] = d_scores
                    plgpu.commit_smem()
                    meet()  # both have written
                    at = pl.ds(pl.multiple_of(c * HALF, HALF), HALF)
                    for n, smem in enumerate((d_scores_smem, weights_smem)):
                        @pl.when(warpgroup == n)
                        def _(n=n, smem=smem):
                            rows = pl.ds((tile * 2 + n) * HALF, HALF)
                            plgpu.copy_smem_to_gmem(smem, weights_gmem.at[rows, at])

                    first = warpgroup * (W // 2)
                    for acc, width in zip(dq, pieces, strict=True):
                        columns = pl.ds(pl.multiple_of(first, QUARTER), width)
                        plgpu.wgmma(acc, d_scores_smem, kv_smem.at[:, columns])
                        first += width
                    plgpu.wgmma_wait(0)

                keys(c, part)

            lax.fori_loop(0, plan.steps, step, None)
            return [x[...] for x in dq]

        parts = pl.run_scoped(sum_up, *(plgpu.ACC((HALF, n), _F32) for n in pieces))
        # The queries were read last before the warpgroups met: their memory is free.
        first = warpgroup * (W // 2)
        for values in parts:
            send(plan, values, q_smem, dq_gmem, tile, first)
            first += values.shape[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    outs = [jax.ShapeDtypeStruct((plan.tiles * plan.kept, W), _BF16),
            jax.ShapeDtypeStruct((plan.tiles * plan.sets * 2 * HALF, plan.steps * HALF), _BF16)]
    return over_tiles(plan, attend, [q, do, lse2, delta], [kv, bias], outs,
                       shared=[(HALF, HALF)] * 2)


def backward_tiles(plan: Plan, q, do, lse2, delta, kv, bias, gradient=_gradient_tiles):
    """Return dq [queries x kept, D] and the gradient of every gathered token, [.. x 64, D].

    `lse2` is to base 2, 1e30 for rows that see nothing; `do` is filled up with zeros to D.
    """
    dq, weights = gradient(plan, q, do[:, :plan.V], lse2, delta, kv, bias)
    both = [x.reshape(plan.tiles, plan.sets, HALF, plan.D) for x in (q, do)]
    rows = jnp.stack(both, 2).reshape(plan.tiles, -1, plan.D)
    weights = weights.reshape(plan.tiles, rows.shape[1], -1)
    d_tokens = jnp.einsum("qhn,qhd->qnd", weights, rows, preferred_element_type=_F32)
    if plan.D > SUMMED:
        d_scores = weights.reshape(plan.tiles, plan.sets, 2, HALF, -1)[:, :, 0, :kept(plan)]
        rest = jnp.einsum("qshn,qnd->qshd", d_scores,
                          kv[:, SUMMED:].reshape(plan.tiles, -1, plan.D - SUMMED),
                          preferred_element_type=_F32)
        dq = jnp.concatenate([dq, rest.astype(_BF16).reshape(dq.shape[0], -1)], 1)
    return dq, d_tokens.astype(_BF16).reshape(-1, plan.D)


def mass_tiles(plan: Plan, q, lse2, kv):
    """Return the weight of every gathered token, summed over heads [chunk x steps x 64]."""
    factor = plan.scale * LOG2E

    def attend(tile, warpgroup, by_row, keys, outs, mass_smem, meet):
        del meet
        (_, lse_smem), (mass_gmem,) = by_row, outs
        mine = pl.ds(warpgroup * QUARTER, QUARTER)  # heads
        less = plgpu.load(lse_smem.at[mine], layout=_COLUMN)

        def step(c, _):
            def part(rows, kv_smem):
                def score(acc):
                    plgpu.wgmma(acc, kv_smem, rows[0].at[mine].transpose((1, 0)))
                    return acc[...]

                raw = pl.run_scoped(score, plgpu.ACC(_SCORES, _F32))
                return jnp.exp2(raw * factor - hopper.spread(less, _SCORES, 1)).sum(axis=1)

            mass = keys(c, part)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mass_smem.at[warpgroup][...] = mass
            plgpu.commit_smem()
            where = ((tile * plan.steps + c) * 2 + warpgroup) * HALF
            plgpu.copy_smem_to_gmem(mass_smem.at[warpgroup], mass_gmem.at[pl.ds(where, HALF)])

        lax.fori_loop(0, plan.steps, step, None)

    shape = (plan.tiles, plan.sets, plan.steps, 2, HALF)
    total = 2 * plan.tiles * plan.sets * plan.steps * HALF
    (mass,) = over_tiles(plan, attend, [q, lse2], [kv],
                          [jax.ShapeDtypeStruct((total,), _F32)], numbers=2)
    return mass.reshape(shape).sum((1, 3)).reshape(-1)
