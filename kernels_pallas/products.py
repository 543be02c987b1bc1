"""Products on Hopper's tensor cores, a tile of the result at a time: what several ops share.

Each multiprocessor runs one program of three warpgroups. One fills a ring of shared-memory stages
through the copy engine; two multiply, 64 rows of a tile each, and write the result through the
copy engine while the next tile's stages are already being filled. A tile of the result belongs to
one warpgroup, which adds its products in order: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.grouped_matmul.tiles import COLUMNS
from kernels_pallas.hopper import HALF


class Tile:
    """A decoded tile: scalars of the program."""

    def __init__(self, **scalars: Any) -> None:
        self.__dict__.update(scalars)


def in_turns(decode, load, accumulate, finish, *, ring, cores, total, registers=(40, 232)):
    """One program's share of the tiles: every `cores`-th.

    `decode(number)` gives a tile, with the number of its `steps` and whether this warpgroup
    `writes` any of its rows; `load(tile, step, slot)` starts the copies of a stage;
    `accumulate(tile, done)` waits for the stages from turn `done` of the ring on, releases them and
    returns the warpgroup's 64 rows of the result; `finish(tile, result)` writes them. `registers`
    are a thread's in the warpgroup that loads and in those that multiply.
    """
    core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
    share = lax.div(total - core + hopper.i32(cores - 1), hopper.i32(cores))  # total >= 0

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")

        def fill(i, done):
            tile = decode(core + i * cores)

            def stage(k, _):
                load(tile, k, ring.acquire(done + k))

            lax.fori_loop(0, tile.steps, stage, None)
            return done + tile.steps

        lax.fori_loop(0, share, fill, hopper.i32(0))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(registers[1], action="increase")

        def produce(i, done):
            tile = decode(core + i * cores)
            result = accumulate(tile, done)
            pl.when(tile.writes)(lambda: finish(tile, result))
            return done + tile.steps

        lax.fori_loop(0, share, produce, hopper.i32(0))
        plgpu.wait_smem_to_gmem(0)


def write_tile(tile, result, place, out_smem):
    """Write a warpgroup's rows, 64 columns at a time: place(tile, column, memory) starts a copy.

    `out_smem` is [2, slots, 64, 64].
    """
    warpgroup, slots = lax.axis_index("warpgroup"), out_smem.shape[1]
    for part in range(result.shape[1] // COLUMNS):
        slot = out_smem.at[warpgroup, part % slots]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        columns = slice(part * COLUMNS, (part + 1) * COLUMNS)
        slot[...] = result[:, columns].astype(out_smem.dtype)
        plgpu.commit_smem()
        place(tile, part * COLUMNS, slot)
        plgpu.commit_smem_to_gmem_group()


def row_tile(number, items, used, across, *, n, grain, steps, before=None):
    """Decode one of `used` row tiles' (grouped_matmul.tiles.row_items) tiles of n columns.

    Column tiles are done in strips of `across`; in a strip, all of a row tile's before the next's.
    `steps` is how many a product takes; `before` are the tile's rows before those that are written
    here, the other warpgroup's unless given.
    """
    strip = lax.div(number, used * across)
    within = number - strip * used * across
    item = lax.div(within, hopper.i32(across))
    rows = items[item, 2] - (lax.axis_index("warpgroup") * HALF if before is None else before)
    return Tile(expert=items[item, 0], first=pl.multiple_of(items[item, 1], grain),
                steps=items[item, 3] * steps, rows=rows, writes=rows > 0,
                n=pl.multiple_of((strip * across + within - item * across) * n, n))


def summed(multiply, ring, tile, done, *widths):
    """Return a tile's 64 rows of each of these widths, products added up in the tensor cores.

    `multiply(tile, step, slot, *acc)` issues the products of a stage, one for each accumulator.
    """
    def accumulate(*acc):
        def stage(k, _):
            slot = ring.wait(done + k)
            multiply(tile, k, slot, *acc)
            # all but the products just issued are done: free the stage before
            plgpu.wgmma_wait(len(acc))
            pl.when(k > 0)(lambda: ring.release(done + k - 1))

        lax.fori_loop(0, tile.steps, stage, None)
        return [x[...] for x in acc]

    result = pl.run_scoped(accumulate, *(plgpu.ACC((HALF, n), jnp.float32) for n in widths))
    pl.when(tile.steps > 0)(lambda: ring.release(done + tile.steps - 1))
    return result[0] if len(widths) == 1 else result


def store_rows(smem, target, first, columns, rows, grain, whole=HALF, rolled=False):
    """Start copies of the first `rows` (any number) of `whole` from memory to `target` at `first`.

    A multiple of `grain` is written where rows end, which belongs to nobody else. `rolled`: by a
    loop, for which registers need not hold the addresses of all pieces at once.
    """
    def store(start, length):
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(start, length)],
                                target.at[pl.ds(first + start, length), columns],
                                commit_group=False)

    pl.when(rows >= whole)(lambda: store(0, whole))
    if rolled:
        pieces = jnp.where(rows < whole, lax.div(rows + (grain - 1), hopper.i32(grain)), 0)
        lax.fori_loop(
            0, pieces, lambda i, _: store(pl.multiple_of(i * grain, grain), grain), None)
        return
    for start in range(0, whole, grain):
        def piece(start=start):
            store(start, grain)

        pl.when((rows < whole) & (rows > start))(piece)


def result_memory(dtype, slots=1):
    """Return the memory through which `write_tile` writes."""
    return hopper.shared((2, slots, HALF, COLUMNS), dtype)


def launch(body, out, *, stages, stage, out_smem, cores, approx_math=False):
    """A kernel of one program per multiprocessor around `body`, with its ring of stages.

    `stage` maps names of shared memory to (shape, dtype) of one stage: rows that are multiplied,
    or one number for each, each filled by one copy. The body gets them as [stages, ...] by name,
    and `out_smem`, full and empty.
    """
    def memory(shape, dtype):
        shape = (stages, *shape)
        return hopper.shared(shape, dtype) if len(shape) > 2 else plgpu.SMEM(shape, dtype)

    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=dict(
            {name: memory(*each) for name, each in stage.items()},
            out_smem=out_smem,
            full=plgpu.Barrier(num_arrivals=len(stage), num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        grid=(cores,),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=device.target().interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
