"""The indexer's scores on Hopper's tensor cores: bfloat16, added up in float32.

What is held, and why XLA takes the best of the scores, is said in gpu_plan.py. What no query of a
program sees is neither loaded nor multiplied.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.hopper import X
from kernels_pallas.indexer import gpu_plan, xla
from kernels_pallas.indexer.gpu_plan import HALF, QUERIES, whole
from kernels_pallas.indexer.xla import Marks, Plan

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_LATER = jnp.iinfo(jnp.int32).max  # where a key ends that nobody may see
_PARAMS = {field.name for field in dataclasses.fields(plgpu.CompilerParams)}  # of this JAX


def _kernel(size: gpu_plan.Scores, stride, span, L, first, segment, q, w, k, ends, segments_k):
    """Return scores [rows of queries, S], -inf where a query does not see a key.

    Shapes: first [1], the row of each lane's query 0; segment [B x L], L whole QUERIES; q
    [B x L x heads, D] and w [B x L x heads]; k [B x S, D], ends and segments_k [B x S] with S whole
    programs' keys.
    """
    P, n, parts, slots = size.together, size.columns, size.parts, size.slots(size.parts)
    B, S, mine = segment.shape[0] // L, size.S, parts * HALF
    blocks, chunks, steps = S // size.keys, L // QUERIES, QUERIES // P
    shape = (HALF, n)

    def body(first_gmem, segment_gmem, q_gmem, w_gmem, k_gmem, ends_gmem, segments_gmem,
             scores_gmem, *, q_smem, w_smem, k_smem, ends_smem, segments_smem, out_smem, q_bar,
             k_bar):
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        cores = device.target().cores
        by_query, by_keys = hopper.Ring(*q_bar, slots), hopper.Ring(*k_bar, 1)
        share = hopper.share(hopper.i32(B * chunks * blocks))

        def decode(i):
            """(lane, first query of it, first key, steps before any key is seen)."""
            number = core + i * cores
            chunk = lax.div(number, hopper.i32(blocks))
            lane = lax.div(chunk, hopper.i32(chunks))
            t, s = (chunk - lane * chunks) * QUERIES, (number - chunk * blocks) * size.keys
            blind = s * stride + (span - 1) - first_gmem[0] - t  # queries, if above 0
            blind = lax.div(jnp.maximum(blind, 0), hopper.i32(P))
            return lane, t, s, jnp.minimum(blind, steps)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def fill(i, done):
                lane, t, s, blind = decode(i)
                queries, met = done

                @pl.when(blind < steps)
                def _():
                    slot = by_keys.acquire(met)
                    for j in range(parts):  # a copy takes at most 256 rows
                        rows = pl.ds(pl.multiple_of(lane * S + s + j * X, X), X)
                        for source, target in ((k_gmem, k_smem), (ends_gmem, ends_smem),
                                               (segments_gmem, segments_smem)):
                            plgpu.copy_gmem_to_smem(
                                source.at[rows], target.at[slot, pl.ds(j * X, X)],
                                by_keys.full.at[slot])

                def step(c, _):
                    slot = by_query.acquire(queries + c - blind)
                    row = (lane * L + t + c * P) * size.heads
                    rows = pl.ds(pl.multiple_of(row, 8), n)
                    for source, target in ((q_gmem, q_smem), (w_gmem, w_smem)):
                        plgpu.copy_gmem_to_smem(source.at[rows], target.at[slot],
                                                by_query.full.at[slot])

                lax.fori_loop(blind, steps, step, None)
                return queries + steps - blind, met + (blind < steps).astype(jnp.int32)

            lax.fori_loop(0, share, fill, (hopper.i32(0), hopper.i32(0)))

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            own = out_smem.at[warpgroup]

            def part_of(j):
                return pl.ds(pl.multiple_of((warpgroup * parts + j) * HALF, HALF), HALF)

            def send(row, s):
                plgpu.commit_smem()
                columns = pl.ds(pl.multiple_of(s + warpgroup * mine, HALF), mine)
                for p in range(P):
                    plgpu.copy_smem_to_gmem(own.at[p], scores_gmem.at[row + p, columns],
                                            commit_group=False)
                plgpu.commit_smem_to_gmem_group()

            def multiply(i, done):
                lane, t, s, blind = decode(i)
                queries, met = done
                row = lane * L + t

                def unseen(c, _):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    nothing = plgpu.layout_cast(jnp.full((HALF,), -jnp.inf, _F32), _ROW)
                    for p in range(P):
                        for j in range(parts):
                            own.at[p, pl.ds(j * HALF, HALF)][...] = nothing
                    send(row + c * P, s)

                lax.fori_loop(0, blind, unseen, None)

                @pl.when(blind < steps)
                def _():
                    by_keys.wait(met)

                def step(c, _):
                    slot = by_query.wait(queries + c - blind)
                    at = row + c * P
                    own_segments = [segment_gmem[at + p] for p in range(P)]
                    # a query of no segment stands before all keys
                    stands = [jnp.where(own_segments[p] == 0, -1, first_gmem[0] + t + c * P + p)
                              for p in range(P)]
                    weights = plgpu.load(w_smem.at[slot], layout=_COLUMN)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    def part(j, _):
                        keys = part_of(j)

                        def product(acc):
                            plgpu.wgmma(acc, k_smem.at[0, keys], q_smem.at[slot].transpose((1, 0)))
                            return acc[...]

                        raw = pl.run_scoped(product, plgpu.ACC(shape, _F32))
                        hits = jnp.maximum(raw, 0) * hopper.spread(weights, shape, 1)
                        ends = plgpu.load(ends_smem.at[0, keys], layout=_ROW)
                        segments = plgpu.load(segments_smem.at[0, keys], layout=_ROW)
                        for p in range(P):
                            score = hits[:, p * size.heads:(p + 1) * size.heads].sum(axis=1)
                            seen = (ends <= stands[p]) & (segments == own_segments[p])
                            own.at[p, pl.ds(j * HALF, HALF)][...] = jnp.where(
                                seen, score, -jnp.inf)

                    lax.fori_loop(0, parts, part, None)
                    send(at, s)  # what was read is done with before what was written goes
                    by_query.release(queries + c - blind)

                lax.fori_loop(blind, steps, step, None)
                pl.when(blind < steps)(lambda: by_keys.release(met))
                return queries + steps - blind, met + (blind < steps).astype(jnp.int32)

            lax.fori_loop(0, share, multiply, (hopper.i32(0), hopper.i32(0)))
            plgpu.wait_smem_to_gmem(0)

    memory = dict(
        q_smem=hopper.shared((slots, n, size.width), _BF16),
        w_smem=plgpu.SMEM((slots, n), _F32),
        k_smem=hopper.shared((1, size.keys, size.width), _BF16),
        ends_smem=plgpu.SMEM((1, size.keys), jnp.int32),
        segments_smem=plgpu.SMEM((1, size.keys), jnp.int32),
        out_smem=plgpu.SMEM((2, P, mine), _F32),
        q_bar=hopper.barriers(2, slots),
        k_bar=hopper.barriers(3 * parts, 1),
    )
    # Sums here go along rows, which warps do among themselves: no memory for them.
    params = {name: 0 for name in _PARAMS if name == "reduction_scratch_bytes"}
    out = jax.ShapeDtypeStruct((B * L, S), _F32)
    return hopper.launch(body, out, memory, **params)(first, segment, q, w, k, ends, segments_k)


def _padded(x, length, fill=0, dim=1):
    """Fill up a dim with numbers."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, length - x.shape[dim])
    return jnp.pad(x, widths, constant_values=fill)


def scores(plan: Plan, marks: Marks, first, q_BxCxJxD, k_BxSxD, w_BxCxJ, segments_q):
    """Return [B, C, S] float32 scores of the queries from row `first` on, -inf for unseen keys."""
    (B, C, J, D), S = q_BxCxJxD.shape, k_BxSxD.shape[1]
    size = gpu_plan.Scores(J, D, S)
    L, keys = whole(C, QUERIES), whole(S, size.keys)
    size = dataclasses.replace(size, S=keys)

    q = _padded(_padded(_padded(q_BxCxJxD, L), size.heads, dim=2), size.width, dim=3)
    w = _padded(_padded(w_BxCxJ.astype(_F32) * plan.scale, L), size.heads, dim=2)
    k = _padded(_padded(k_BxSxD, keys), size.width, dim=2)
    if marks.ends is None:
        ends = lax.iota(jnp.int32, S) * plan.stride + (plan.span - 1)
        ends = jnp.broadcast_to(ends, (B, S))
    else:
        ends = marks.ends[:, :S].astype(jnp.int32)
    if marks.segments_k is None:
        segments_q, segments_k = jnp.ones((B, C), jnp.int32), jnp.ones((B, S), jnp.int32)
    else:
        segments_k = marks.segments_k[:, :S].astype(jnp.int32)
    found = _kernel(
        size, plan.stride, plan.span, L, jnp.asarray(first, jnp.int32).reshape(1),
        _padded(segments_q.astype(jnp.int32), L).reshape(-1), q.reshape(-1, size.width),
        w.reshape(-1), k.reshape(-1, size.width), _padded(ends, keys, _LATER).reshape(-1),
        _padded(segments_k, keys).reshape(-1))
    return found.reshape(B, L, keys)[:, :C, :S]


index_select = xla.selecting(scores, gpu_plan.SCORES)
