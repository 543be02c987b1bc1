"""What the Mosaic GPU kernels for Blackwell share: products that add up in tensor memory.

Each multiprocessor runs one program of three warpgroups. One fills a ring of shared-memory stages
through the copy engine; one issues products, which the tensor cores add up in tensor memory by
themselves; one takes a tile's sums from there and writes them, while the next tile's products run
into the other half of that memory. A tile is added up in the order of its stages by one program:
the same bits every time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.grouped_matmul.tiles import COLUMNS, TILE_M

LOADS, MULTIPLIES, WRITES = range(3)  # what each warpgroup does
# Registers of a thread in each: 168 at entry, of which the last is given what others do not need.
_FEWER, _SOME, _MORE = 40, 152, 232
# Tiles whose sums are in tensor memory at once; it has 512 columns of 128 rows in float32.
PLACES = 2


@dataclasses.dataclass(frozen=True)
class Sums:
    """Places of tensor memory that products add up in and results are taken from, in turns.

    `count` is how many tiles went before; `width` the columns of a place.
    """

    tmem: Any
    full: Any
    free: Any
    width: int

    def _place(self, count):
        return lax.rem(count, hopper.i32(PLACES))

    def _columns(self, count):
        return self.tmem.at[:, pl.ds(self._place(count) * self.width, self.width)]

    def acquire(self, count):
        """Wait until the place of this turn may be written, and return it."""
        @pl.when(count >= PLACES)
        def _():
            plgpu.barrier_wait(self.free.at[self._place(count)])

        return self._columns(count)

    def complete(self, count):
        """Let the place of this turn be read as soon as all products issued so far are done."""
        plgpu.tcgen05_commit_arrive(self.full.at[self._place(count)])

    def wait(self, count):
        """Wait until the products of this turn are done, and return their place."""
        plgpu.barrier_wait(self.full.at[self._place(count)])
        return self._columns(count)

    def release(self, count):
        """Let the place of this turn be written anew, once what was read of it has arrived."""
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(self.free.at[self._place(count)])


def fill(decode, load, *, ring, cores, total):
    """What the warpgroup does that loads: start the copies of every stage of its tiles."""
    def tile_of(i, done):
        tile = decode(lax.axis_index("core") + i * cores)
        lax.fori_loop(0, tile.steps, lambda k, _: load(tile, k, ring.acquire(done + k)), None)
        return done + tile.steps

    lax.fori_loop(0, hopper.share(total), tile_of, hopper.i32(0))


def in_turns(decode, load, multiply, finish, *, ring, sums, cores, total):
    """One program's share of the tiles: every `cores`-th.

    `decode(number)` gives a tile, with the number of its `steps` and whether it `writes` anything;
    `load(tile, step, slot)` starts the copies of a stage; `multiply(tile, step, slot, place)`
    issues its products into a place of tensor memory; `finish(tile, place)` writes the result.
    """
    core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
    share = hopper.share(total)

    @pl.when(warpgroup == LOADS)
    def _():
        plgpu.set_max_registers(_FEWER, action="decrease")
        fill(decode, load, ring=ring, cores=cores, total=total)

    @pl.when(warpgroup == MULTIPLIES)
    def _():
        plgpu.set_max_registers(_SOME, action="decrease")

        def add_up(i, done):
            tile = decode(core + i * cores)
            place = sums.acquire(i)

            def stage(k, _):
                slot = ring.wait(done + k)
                multiply(tile, k, slot, place)
                # the stage is free when all products issued so far are done
                plgpu.tcgen05_commit_arrive(ring.empty.at[slot])

            lax.fori_loop(0, tile.steps, stage, None)
            sums.complete(i)
            return done + tile.steps

        lax.fori_loop(0, share, add_up, hopper.i32(0))

    @pl.when(warpgroup == WRITES)
    def _():
        plgpu.set_max_registers(_MORE, action="increase")

        def produce(i, _):
            tile = decode(core + i * cores)
            place = sums.wait(i)
            pl.when(tile.writes)(lambda: finish(tile, place))
            sums.release(i)

        lax.fori_loop(0, share, produce, None)
        plgpu.wait_smem_to_gmem(0)


def by_role(load, multiply, write, *, registers=(_FEWER, _SOME, _MORE)):
    """Call each of these in its warpgroup, with so many registers of a thread's."""
    roles = {LOADS: (load, registers[0], "decrease"),
             MULTIPLIES: (multiply, registers[1], "decrease"),
             WRITES: (write, registers[2], "increase")}
    for role, (call, registers, action) in roles.items():
        def run(call=call, registers=registers, action=action):
            plgpu.set_max_registers(registers, action=action)
            call()

        pl.when(lax.axis_index("warpgroup") == role)(run)


def by_tensor_cores(n, arrivals=1):
    """Return so many barriers that products arrive at, or that let them go on."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=n, orders_tensor_core=True)


def places(width):
    """Return the memory and the barriers of `Sums`, by name."""
    return {"tmem": plgpu.TMEM((TILE_M, PLACES * width), jnp.float32),
            "full": by_tensor_cores(PLACES), "free": by_tensor_cores(PLACES)}


def taken(tile, place, column):
    """Return COLUMNS of a tile's sums [128, COLUMNS] in float32; zeros where nothing was added."""
    values = plgpu.async_load_tmem(place.at[:, pl.ds(column, COLUMNS)])
    steps = lax.broadcast_in_dim(tile.steps, values.shape, ())
    return jnp.where(steps > 0, values, jnp.zeros_like(values))


def write_tile(width, take, place, out_smem):
    """Write take(column) [128, columns] for all of a tile: place(column, memory) starts copies.

    `out_smem` is [slots, 128, columns].
    """
    slots, _, columns = out_smem.shape
    for part in range(width // columns):
        column, slot = part * columns, out_smem.at[part % slots]
        values = take(column)
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        slot[...] = values.astype(out_smem.dtype)
        plgpu.commit_smem()
        place(column, slot)
        plgpu.commit_smem_to_gmem_group()


def launch(body, out, *, stages, stage, width, out_smem, cores, approx_math=False, writers=1,
           **more):
    """A kernel of one program per multiprocessor around `body`, with its ring and its sums.

    `stage` maps names of shared memory to (shape, dtype) of one stage, each filled by one copy, and
    `width` are the columns of a tile's sums, which so many `writers`, a warpgroup each, release
    together. The body gets the arrays, and by name each stage's memory as [stages, ...],
    `out_smem`, `ring`, `sums` and what `more` memory is named.
    """
    def program(*refs, full, empty, sums_tmem, summed, free, **memory):
        body(*refs, ring=hopper.Ring(full, empty, stages),
             sums=Sums(sums_tmem, summed, free, width), **memory)

    memory = {name: hopper.shared((stages, *shape), dtype)
              for name, (shape, dtype) in stage.items()}
    return plgpu.kernel(
        program, out_type=out,
        scratch_types=dict(
            memory, out_smem=out_smem, **more,
            full=plgpu.Barrier(num_arrivals=len(stage), num_barriers=stages),
            empty=by_tensor_cores(stages),
            sums_tmem=plgpu.TMEM((TILE_M, PLACES * width), jnp.float32),
            summed=by_tensor_cores(PLACES), free=by_tensor_cores(PLACES, writers)),
        grid=(cores,), grid_names=("core",), num_threads=WRITES + writers,
        thread_name="warpgroup", interpret=device.target().interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
