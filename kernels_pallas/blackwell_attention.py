"""What Blackwell's kernels of attention share: scores, weights and sums in tensor memory.

Each multiprocessor runs one program of four warpgroups. One fills rings of shared memory through
the copy engine. One issues all products, in one order, so that the same bits come every time. Two
compute by turns: while one bends a step's scores into weights, the tensor cores have the other's
products. Both have the same steps, each with rows of its own, or every other step; and both add up
in the same sums, or each in its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.blackwell_scores import (
    LAYOUT,
    ROWS,
    STEP,
    Memory,
    barrier,
    memory_of,
    piece_of,
    place_of,
)
from kernels_pallas.hopper import i32

LOADS, MULTIPLIES, COMPUTES = range(3)  # what a warpgroup does; the fourth computes too
_FEWER, _SOME, _MORE = 40, 56, 208  # registers of a thread in each, 128 at entry


def in_turns(decode, load_rows, load_step, products, attend, finish, *, share, rows, steps, memory,
             both, numbers):
    """One program's `share` of the tiles.

    `decode(i)` gives its i-th tile, with how many `steps` are streamed to it; `load_rows(tile,
    slot)` and `load_step(tile, step, slot)` start copies into the rings `rows` and `steps`.
    products(slot, step_slot, place) returns the (a, b) of each product a b^T of scores, and the b
    of each weights b that a sum is of.

    attend(tile, slot, place, take, each) runs in the two computing warpgroups, whose number is
    `place`: take(k, use) returns use(found, keep, step_slot) of step k, where found(n, column)
    reads PIECE columns of scores and keep(n, column, weights) stores some; each(first, last, body,
    state) loops over those steps of a range that are its own, all of them with `both`. It returns
    what finish(tile, place, results) is told when all is added up. With every other step for each,
    the ring of steps has an even number of slots. `numbers` tells whether they read shared memory
    of rows and of steps themselves, which is then made known to the copies that fill it anew.
    """
    warpgroup = lax.axis_index("warpgroup")
    views = 2 if both else 1

    def load():
        plgpu.set_max_registers(_FEWER, action="decrease")

        def fill(i, done):
            tile = decode(i)
            load_rows(tile, rows.acquire(i))
            lax.fori_loop(0, tile.steps,
                          lambda k, _: load_step(tile, k, steps.acquire(done + k)), None)
            return done + tile.steps

        lax.fori_loop(0, share, fill, i32(0))

    def multiply():
        plgpu.set_max_registers(_SOME, action="decrease")

        def add_up(i, done):
            tile = decode(i)
            slot = rows.wait(i)
            count = tile.steps * views

            def weigh(n, place):
                plgpu.barrier_wait(memory.ready.at[place])
                # the sums of the tile before were taken
                pl.when((n == 0) & (i > 0))(lambda: plgpu.barrier_wait(memory.taken))
                step_slot = steps.slot(done + lax.div(n, i32(views)))
                for m, b in enumerate(products(slot, step_slot, place)[1]):
                    plgpu.tcgen05_mma(memory.sum(place, m), place_of(memory.weights[m], place), b,
                                      accumulate=n >= 1 + memory.apart)

                def release():
                    plgpu.tcgen05_commit_arrive(steps.empty.at[step_slot])

                if both:
                    pl.when(lax.rem(n, i32(2)) == 1)(release)
                else:
                    release()

            def score(n, place):
                step = done + lax.div(n, i32(views))
                if both:
                    pl.when(lax.rem(n, i32(2)) == 0)(lambda: _wait(steps, step))
                else:
                    _wait(steps, step)
                scored = products(slot, steps.slot(step), place)[0]
                for target, (a, b) in zip(memory.scores, scored, strict=True):
                    plgpu.tcgen05_mma(place_of(target, place), a, b.transpose((1, 0)),
                                      accumulate=False)
                plgpu.tcgen05_commit_arrive(memory.scored.at[place])

            def item(n, _):
                # One of each place is under way: its weights come before its next scores.
                place = lax.rem(done * views + n, i32(2))
                pl.when(n >= 2)(lambda: weigh(n - 2, place))
                pl.when(n < count)(lambda: score(n, place))

            lax.fori_loop(0, jnp.where(count > 0, count + 2, 0), item, None)
            pl.when((count == 0) & (i > 0))(lambda: plgpu.barrier_wait(memory.taken))
            plgpu.tcgen05_commit_arrive(memory.summed)
            return done + tile.steps

        lax.fori_loop(0, share, add_up, i32(0))

    def compute():
        plgpu.set_max_registers(_MORE, action="increase")
        mine = warpgroup - COMPUTES

        def finished(i, done):
            tile = decode(i)
            slot = rows.wait(i)

            def take(k, use):
                step_slot = steps.wait(done + k)
                plgpu.barrier_wait(memory.scored.at[mine])

                def found(n, column):
                    return plgpu.async_load_tmem(piece_of(memory.scores[n], mine, column),
                                                 layout=LAYOUT)

                def keep(n, column, weights):
                    plgpu.async_store_tmem(piece_of(memory.weights[n], mine, column),
                                           weights.astype(jnp.bfloat16))

                result = use(found, keep, step_slot)
                plgpu.commit_tmem()
                if numbers[1]:
                    plgpu.commit_smem()
                plgpu.wait_load_tmem()
                plgpu.barrier_arrive(memory.ready.at[mine])
                return result

            def each(first, last, body, state):
                if both:
                    return lax.fori_loop(first, last, body, state)
                first = first + ((mine + done + first) & 1)
                count = lax.div(last - first + 1, i32(2))  # first <= last + 1
                return lax.fori_loop(0, count, lambda j, state: body(first + 2 * j, state), state)

            results = attend(tile, slot, mine, take, each)
            plgpu.barrier_wait(memory.summed)
            if numbers[0]:
                plgpu.commit_smem()
            rows.release(i)
            finish(tile, mine, results)
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(memory.taken)
            return done + tile.steps

        lax.fori_loop(0, share, finished, i32(0))
        plgpu.wait_smem_to_gmem(0)

    # One in the other: which warpgroup it is is in no register while it loads.
    lax.cond(warpgroup >= COMPUTES, compute,
             lambda: lax.cond(warpgroup == LOADS, load, multiply))


def _wait(ring, count):
    ring.wait(count)


class Tile(NamedTuple):
    """A tile of a program: how many `steps` are streamed to it, and what a kernel knows `at`."""

    steps: Any
    at: Any


class Own(NamedTuple):
    """What a computing warpgroup has of a tile: its number `place`, its `rows` of what is fixed.

    each(first, last, body, state) loops over those steps of a range that are its own; meet(k, use)
    takes step k's scores and returns use(found, keep, *streamed), as `in_turns` has it.
    scale(n, factor) multiplies a sum's rows before its next product; take(n, column, width) returns
    some columns of it, once all is added up.
    """

    place: Any
    rows: Any
    each: Any
    meet: Any
    scale: Any
    take: Any


def over_tiles(attend, products, decode, fixed, streamed, outs, *, rows_at, step_at, out_at, total,
               scores, weights, sums, apart, both=False, scalars=(), kept=ROWS):
    """A kernel that calls `attend` for every tile of `fixed` arrays' rows.

    A tile has ROWS rows of which the two computing warpgroups add up one sum, or when `apart` each
    has ROWS and sums of its own. Each has every other step, or with `both` every one. The `sums`
    have these widths. `outs` are pairs of a shape and its width, 1 of numbers; of rows the first
    `kept` of ROWS are written.

    decode(scalars, number) gives one of total(scalars) tiles, `scalars` the arrays that are read
    where they lie. rows_at(tile.at, ref), step_at(tile.at, k, ref) and out_at(tile.at, place, ref,
    columns) are parts of arrays in the chip's memory: a tile's rows, a step's STEP, and those of a
    result, some columns of it where they are given. products(rows, streamed) are a step's, as
    `in_turns` wants them. attend(tile, own, scalars) returns a list of the values of `outs`:
    ROWS numbers, or for rows take(column, width).
    """
    size = ROWS * (1 + apart)
    numbers = [x for x, width in outs if width == 1]
    (dtype,) = {x.dtype for x, width in outs if width > 1}
    part = 128 // dtype.itemsize
    left = hopper.SHARED - hopper.BARRIERS - 1024 * (len(fixed) + len(streamed))
    left -= 2 * ROWS * (128 + 4 * len(numbers))
    per_tile, per_step = _bytes(fixed, size), _bytes(streamed, STEP)
    tile_slots = 2 if left >= 2 * per_tile + 4 * per_step else 1
    step_slots = min((left - tile_slots * per_tile) // per_step, 6)
    if not both:
        step_slots -= step_slots % 2
    assert step_slots >= 2, f"{left} bytes for {per_tile} and {per_step}"
    cores = device.target().cores

    def body(*refs, fixed_smem, streamed_smem, numbers_smem, out_smem, tile_bar, step_bar, tensor):
        ends = [len(scalars), len(scalars) + len(fixed)]
        ends.append(ends[1] + len(streamed))
        scalars_gmem, fixed_gmem = refs[:ends[0]], refs[ends[0]:ends[1]]
        streamed_gmem, outs_gmem = refs[ends[1]:ends[2]], refs[ends[2]:]
        core = lax.axis_index("core")
        by_tile, by_step = hopper.Ring(*tile_bar, tile_slots), hopper.Ring(*step_bar, step_slots)
        memory = Memory(*tensor, sums, apart)

        def load_rows(tile, slot):
            for source, target in zip(fixed_gmem, fixed_smem, strict=True):
                plgpu.copy_gmem_to_smem(rows_at(tile.at, source), target.at[slot],
                                        by_tile.full.at[slot])

        def load_step(tile, k, slot):
            for source, target in zip(streamed_gmem, streamed_smem, strict=True):
                plgpu.copy_gmem_to_smem(step_at(tile.at, k, source), target.at[slot],
                                        by_step.full.at[slot])

        def of(slot, place):
            rows = pl.ds(place * ROWS if apart else 0, ROWS)
            return [x.at[slot, rows] for x in fixed_smem]

        def step(slot):
            return [x.at[slot] for x in streamed_smem]

        def compute(tile, slot, place, take, each):
            own = Own(place, of(slot, place), each,
                      lambda k, use: take(k, lambda found, keep, at: use(found, keep, *step(at))),
                      functools.partial(memory.scale, place),
                      functools.partial(memory.take, place, tile.steps))
            return attend(tile, own, scalars_gmem)

        def finish(tile, place, results):
            staged, parts = iter(numbers_smem), 0
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for value, target, (_, width) in zip(results, outs_gmem, outs, strict=True):
                if width == 1:
                    number = next(staged).at[place]
                    number[...] = value
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(number, out_at(tile.at, place, target, None))
                    continue
                for column in range(0, width, part):
                    def send(value=value, target=target, column=column):
                        found, smem = value(column, part), out_smem.at[place]
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        smem[...] = found.astype(smem.dtype)
                        plgpu.commit_smem()
                        columns = pl.ds(column, part)
                        plgpu.copy_smem_to_gmem(smem if kept == ROWS else smem.at[pl.ds(0, kept)],
                                                out_at(tile.at, place, target, columns))

                    if apart:
                        send()
                    else:  # the two share what they have added up
                        pl.when(place == parts % 2)(send)
                    parts += 1

        share = lax.div(total(scalars_gmem) - core + i32(cores - 1), i32(cores))
        in_turns(lambda i: decode(scalars_gmem, core + i * cores), load_rows, load_step,
                 lambda slot, at, place: products(of(slot, place), step(at)), compute, finish,
                 share=share, rows=by_tile, steps=by_step, memory=memory, both=both,
                 numbers=[any(_width(x) == 1 for x in arrays) for arrays in (fixed, streamed)])

    def shared(slots, rows, x):
        width = _width(x)
        if width == 1:
            return plgpu.SMEM((slots, rows), x.dtype)
        return hopper.shared((slots, rows, width), x.dtype)

    scratch = dict(
        fixed_smem=[shared(tile_slots, size, x) for x in fixed],
        streamed_smem=[shared(step_slots, STEP, x) for x in streamed],
        numbers_smem=[plgpu.SMEM((2, ROWS), x.dtype) for x in numbers],
        out_smem=hopper.shared((2, ROWS, part), dtype),
        tile_bar=hopper.barriers(len(fixed), tile_slots),
        step_bar=(plgpu.Barrier(num_arrivals=len(streamed), num_barriers=step_slots),
                  barrier(1, step_slots)),
        tensor=memory_of(scores, weights, sums, apart),
    )
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outs]
    target = device.target()
    kernel = plgpu.kernel(
        body, out_type=results, scratch_types=scratch, grid=(cores,), grid_names=("core",),
        num_threads=4, thread_name="warpgroup", interpret=target.interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
    return kernel(*scalars, *fixed, *streamed)


def _width(x):
    """Columns of what is read: rows of bfloat16, or a number for each row."""
    return x.shape[-1] if x.dtype == jnp.bfloat16 else 1


def _bytes(arrays, rows):
    return rows * sum(_width(x) * x.dtype.itemsize for x in arrays)
