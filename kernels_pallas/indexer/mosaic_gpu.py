"""The indexer's scores on a GPU's tensor cores: bfloat16, added up in float32.

What is held, and why XLA takes the best of the scores, is said in gpu_plan.py. What no query of a
program sees is neither loaded nor multiplied. Hopper's products are here, Blackwell's in
mosaic_gpu_blackwell.py; what they have in common is all the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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
_LATER = jnp.iinfo(jnp.int32).max  # where a key ends that nobody may see
# Sums here go along rows, which warps do among themselves: no memory for them.
ALONG_ROWS = {field.name: 0 for field in dataclasses.fields(plgpu.CompilerParams)
              if field.name == "reduction_scratch_bytes"}


class Products(NamedTuple):
    """How a generation multiplies keys with queries' heads.

    `writers` warpgroups take products of `rows` keys, in registers as `layout`, of so many columns
    `at_once` or of one query. `memory(columns)` is what products need, by name; `run(fill, issue,
    write, ...)` shares the work out: fill() loads; issue(product) calls product(turn, slot, keys)
    for every product in turn, where a warpgroup of its own issues them; write(writer, take, done)
    does the rest, where take(turn, slot, keys)(columns) returns numbers and done(turn) ends it.
    """

    layout: Any
    writers: int
    rows: int
    at_once: int
    memory: Callable[..., Any]
    run: Callable[..., None]


def _run(fill, issue, write, *, k_smem, q_smem, columns):
    """Hopper's: each of two warpgroups multiplies what it takes."""
    del issue
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        fill()

    def take(turn, slot, keys):
        del turn

        def product(acc):
            plgpu.wgmma(acc, k_smem.at[0, keys], q_smem.at[slot].transpose((1, 0)))
            return acc[...]

        return lambda _: pl.run_scoped(product, plgpu.ACC((HALF, columns), _F32))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        write(warpgroup, take, lambda turn: None)
        plgpu.wait_smem_to_gmem(0)


_HOPPER = Products(plgpu.Layout.WGMMA, writers=2, rows=HALF, at_once=gpu_plan.COLUMNS,
                   memory=lambda columns: {}, run=_run)


def _kernel(how: Products, size: gpu_plan.Scores, stride, span, L, first, segment, q, w, k, ends,
            segments_k):
    """Return scores [rows of queries, S], -inf where a query does not see a key.

    Shapes: first [1], the row of each lane's query 0; segment [B x L], L whole QUERIES; q
    [B x L x heads, D] and w [B x L x heads]; k [B x S, D], ends and segments_k [B x S] with S whole
    programs' keys.
    """
    P, n, parts, slots = size.together, size.columns, size.parts, size.slots(size.parts)
    B, S, mine = segment.shape[0] // L, size.S, parts * how.rows
    blocks, chunks, steps = S // size.keys, L // QUERIES, QUERIES // P
    by_row, by_column = how.layout.reduce(1), how.layout.reduce(0)
    group = max(how.at_once // size.heads, 1)  # queries whose products are taken at once
    groups = [pl.ds(p * size.heads, min(group, P) * size.heads) for p in range(0, P, group)]

    def body(first_gmem, segment_gmem, q_gmem, w_gmem, k_gmem, ends_gmem, segments_gmem,
             scores_gmem, *, q_smem, w_smem, k_smem, ends_smem, segments_smem, out_smem, q_bar,
             k_bar, **memory):
        core = lax.axis_index("core")
        cores = device.target().cores
        by_query, by_keys = hopper.Ring(*q_bar, slots), hopper.Ring(*k_bar, 1)
        share = hopper.share(hopper.i32(B * chunks * blocks))
        nothing_done = hopper.i32(0), hopper.i32(0)  # of queries, of tiles with keys

        def decode(i):
            """(lane, first query of it, first key, steps before any key is seen)."""
            number = core + i * cores
            chunk = lax.div(number, hopper.i32(blocks))
            lane = lax.div(chunk, hopper.i32(chunks))
            t, s = (chunk - lane * chunks) * QUERIES, (number - chunk * blocks) * size.keys
            blind = s * stride + (span - 1) - first_gmem[0] - t  # queries, if above 0
            blind = lax.div(jnp.maximum(blind, 0), hopper.i32(P))
            return lane, t, s, jnp.minimum(blind, steps)

        def after(done, blind):
            queries, met = done
            return queries + steps - blind, met + (blind < steps).astype(jnp.int32)

        def fill():
            def tile(i, done):
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
                return after(done, blind)

            lax.fori_loop(0, share, tile, nothing_done)

        def issue(product):
            def tile(i, done):
                *_, blind = decode(i)
                queries, met = done

                @pl.when(blind < steps)
                def _():
                    by_keys.wait(met)

                def step(c, _):
                    turn = queries + c - blind
                    slot = by_query.wait(turn)

                    def part(j, _):
                        keys = pl.ds(pl.multiple_of(j * how.rows, how.rows), how.rows)
                        product(turn * parts + j, slot, keys)

                    lax.fori_loop(0, parts, part, None)

                lax.fori_loop(blind, steps, step, None)
                return after(done, blind)

            lax.fori_loop(0, share, tile, nothing_done)

        def write(writer, take, done_with):
            own = out_smem.at[writer]

            def part_of(j):
                first = pl.multiple_of((writer * parts + j) * how.rows, how.rows)
                return pl.ds(first, how.rows)

            def send(row, s):
                plgpu.commit_smem()
                columns = pl.ds(pl.multiple_of(s + writer * mine, HALF), mine)
                for p in range(P):
                    plgpu.copy_smem_to_gmem(own.at[p], scores_gmem.at[row + p, columns],
                                            commit_group=False)
                plgpu.commit_smem_to_gmem_group()

            def tile(i, done):
                lane, t, s, blind = decode(i)
                queries, met = done
                row = lane * L + t

                def unseen(c, _):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    nothing = plgpu.layout_cast(jnp.full((how.rows,), -jnp.inf, _F32), by_row)
                    for p in range(P):
                        for j in range(parts):
                            own.at[p, pl.ds(j * how.rows, how.rows)][...] = nothing
                    send(row + c * P, s)

                lax.fori_loop(0, blind, unseen, None)

                @pl.when(blind < steps)
                def _():
                    by_keys.wait(met)

                def step(c, _):
                    turn = queries + c - blind
                    slot = by_query.wait(turn)
                    at = row + c * P
                    own_segments = [segment_gmem[at + p] for p in range(P)]
                    # a query of no segment stands before all keys
                    stands = [jnp.where(own_segments[p] == 0, -1, first_gmem[0] + t + c * P + p)
                              for p in range(P)]
                    weights = [plgpu.load(w_smem.at[slot, columns], layout=by_column)
                               for columns in groups]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    def part(j, _):
                        keys = part_of(j)
                        product = take(turn * parts + j, slot, keys)
                        ends = plgpu.load(ends_smem.at[0, keys], layout=by_row)
                        segments = plgpu.load(segments_smem.at[0, keys], layout=by_row)
                        for g, columns in enumerate(groups):
                            raw = product(columns)
                            hits = jnp.maximum(raw, 0) * hopper.spread(weights[g], raw.shape, 1)
                            for i in range(columns.size // size.heads):
                                p = g * group + i
                                score = hits[:, i * size.heads:(i + 1) * size.heads].sum(axis=1)
                                seen = (ends <= stands[p]) & (segments == own_segments[p])
                                own.at[p, pl.ds(j * how.rows, how.rows)][...] = jnp.where(
                                    seen, score, -jnp.inf)
                        done_with(turn * parts + j)

                    lax.fori_loop(0, parts, part, None)
                    send(at, s)  # what was read is done with before what was written goes
                    by_query.release(turn)

                lax.fori_loop(blind, steps, step, None)
                pl.when(blind < steps)(lambda: by_keys.release(met))
                return after(done, blind)

            lax.fori_loop(0, share, tile, nothing_done)

        how.run(fill, issue, write, k_smem=k_smem, q_smem=q_smem, columns=n, **memory)

    memory = dict(
        q_smem=hopper.shared((slots, n, size.width), _BF16),
        w_smem=plgpu.SMEM((slots, n), _F32),
        k_smem=hopper.shared((1, size.keys, size.width), _BF16),
        ends_smem=plgpu.SMEM((1, size.keys), jnp.int32),
        segments_smem=plgpu.SMEM((1, size.keys), jnp.int32),
        out_smem=plgpu.SMEM((how.writers, P, mine), _F32),
        q_bar=hopper.barriers(2, slots, how.writers),
        k_bar=hopper.barriers(3 * parts, 1, how.writers),
        **how.memory(n),
    )
    out = jax.ShapeDtypeStruct((B * L, S), _F32)
    kernel = hopper.launch(body, out, memory, **ALONG_ROWS)
    return kernel(first, segment, q, w, k, ends, segments_k)


def _padded(x, length, fill=0, dim=1):
    """Fill up a dim with numbers."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, length - x.shape[dim])
    return jnp.pad(x, widths, constant_values=fill)


def scores(plan: Plan, marks: Marks, first, q_BxCxJxD, k_BxSxD, w_BxCxJ, segments_q, *,
           how: Products = _HOPPER):
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
        how, size, plan.stride, plan.span, L, jnp.asarray(first, jnp.int32).reshape(1),
        _padded(segments_q.astype(jnp.int32), L).reshape(-1), q.reshape(-1, size.width),
        w.reshape(-1), k.reshape(-1, size.width), _padded(ends, keys, _LATER).reshape(-1),
        _padded(segments_k, keys).reshape(-1))
    return found.reshape(B, L, keys)[:, :C, :S]


index_select = xla.selecting(scores, gpu_plan.SCORES)
