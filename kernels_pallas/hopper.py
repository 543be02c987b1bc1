"""What the Mosaic GPU kernels for Hopper share: layouts of memory, rings of stages, products."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device

SHARED = 232448  # bytes of shared memory that sm_90 gives a block: 227 KiB
BARRIERS = 4096  # of them kept for barriers and for the alignment of buffers
X, HALF = 128, 64  # rows of a tile, and of one of the two warpgroups that multiply it


def i32(x):
    """Return it as an int32 scalar."""
    return jnp.asarray(x, jnp.int32)


def shared(shape, dtype, row=128):
    """Shared memory in the layout that copy engine and tensor cores share: rows of 128 bytes."""
    wide = row // jnp.dtype(dtype).itemsize
    layout = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(row))
    return plgpu.SMEM(shape, dtype, transforms=layout)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that one warpgroup fills and others empty, in turns.

    `count` is how many times a slot was filled before.
    """

    full: Any
    empty: Any
    slots: int

    def slot(self, count):
        """Return the slot of this turn."""
        return lax.rem(count, i32(self.slots))

    def acquire(self, count):
        """Wait until the slot of this turn may be filled, and return it."""
        slot = self.slot(count)

        @pl.when(count >= self.slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def wait(self, count):
        """Wait until the slot of this turn is filled, and return it."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, count):
        """Let the slot of this turn be filled anew."""
        plgpu.barrier_arrive(self.empty.at[self.slot(count)])


def barriers(copies, slots, consumers=2):
    """Return the barriers (full, empty) of a ring of so many copies a slot and consumers."""
    return (plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=slots))


def interpreted() -> bool:
    """Return whether kernels are interpreted and not compiled."""
    return device.target().interpret is not None


def weigh(acc, a, b, scratch=None):
    """Issue acc += a b, a in registers; where it is interpreted, which cannot, by way of memory."""
    if not interpreted():
        plgpu.wgmma(acc, a, b)
        return
    scratch[...] = a
    plgpu.commit_smem()
    plgpu.wgmma(acc, scratch, b)


def onto(values, issue):
    """Return values after issue(acc) added products to them, in place of new registers."""
    if interpreted():  # which starts accumulators from zero only
        return values + pl.run_scoped(lambda acc: (issue(acc), acc[...])[1],
                                      plgpu.ACC(values.shape, jnp.float32))
    return pl.run_state(issue)(plgpu.ACC.init(values))


def spread(x, shape, dim):
    """Return x along this dim of a product's result."""
    return lax.broadcast_in_dim(x, shape, [dim])


def launch(body, out, scratch, **params):
    """A kernel of one program of three warpgroups per multiprocessor; `params` for the compiler."""
    target = device.target()
    return plgpu.kernel(
        body, out_type=out, scratch_types=scratch, grid=(target.cores,), grid_names=("core",),
        num_threads=3, thread_name="warpgroup", interpret=target.interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **params))


def share(total):
    """Return how many of `total` items this program takes: every cores-th."""
    cores = device.target().cores
    return lax.div(total - lax.axis_index("core") + i32(cores - 1), i32(cores))


def _memory(shape, dtype, row):
    """Shared memory of slots: rows that are multiplied, or a number for each row."""
    return shared(shape, dtype, row) if len(shape) > 2 else plgpu.SMEM(shape, dtype)


def _row_bytes(arrays) -> int:
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in arrays)


def over_tiles(attend, rows, keyed, outs, *, steps, step_rows, group, used, part_outs=(),
               scratch=(), split=False, kept=HALF, own=(), products=None):
    """A kernel that calls `attend` for every tile of X rows in use, with its rows and keys loaded.

    `rows` are arrays by row of the tiles, [Z x X, D] or [Z x X], and `outs` shapes of results,
    [Z x 2 x kept, ...]: the first `kept` rows of each half. `keyed` are arrays by key,
    [E x steps x step_rows, ...], of which a tile has those of its `group` [Z], loaded in steps;
    `part_outs` shapes of results by step, [Z x steps x X, ...]. `scratch` are shapes of bfloat16
    memory of each warpgroup. `used` [1] is how many tiles there are.

    `own` are arrays [Z x steps x X, ...] of which every tile has its own in each step, half of them
    for each warpgroup; they come after the keyed ones.

    attend(rows, keys, emit, scratch) runs in each of the two multiplying warpgroups, with its half
    of the rows, and returns the values of `outs`; keys(c, use) returns use(*keyed) of step c, of
    which a warpgroup sees its half when they are `split`; emit(c, values) writes part_outs. With
    `products` (halves.py) it is given the warpgroup's as a fifth argument.
    """
    row = products.row_bytes if products else 128
    staging = 2 * HALF * (_row_bytes(outs) + _row_bytes(part_outs))
    staging += 2 * sum(2 * math.prod(shape) for shape in scratch)
    per_tile, per_step = X * _row_bytes(rows), step_rows * _row_bytes(keyed) + X * _row_bytes(own)
    left = SHARED - BARRIERS - staging
    row_slots = 3 if steps == 1 else 2
    if left < row_slots * per_tile + 2 * per_step:
        row_slots = 1
    key_slots = min((left - row_slots * per_tile) // per_step, 6)
    assert key_slots >= 1, f"{left} bytes for {per_tile} and {per_step}"

    def body(group_gmem, used_gmem, *refs, rows_smem, keyed_smem, out_smem, part_smem,
             scratch_smem, rows_bar, keys_bar, sums=None):
        by_tile = [False] * len(keyed) + [True] * len(own)
        ends = [len(rows), len(rows) + len(by_tile), len(rows) + len(by_tile) + len(outs)]
        rows_gmem, keyed_gmem = refs[:ends[0]], refs[ends[0]:ends[1]]
        outs_gmem, parts_gmem = refs[ends[1]:ends[2]], refs[ends[2]:]
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        cores = device.target().cores
        by_row, by_key = Ring(*rows_bar, row_slots), Ring(*keys_bar, key_slots)
        tiles = share(used_gmem[0])

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def fill(i, _):
                tile = core + i * cores
                slot = by_row.acquire(i)
                for source, target in zip(rows_gmem, rows_smem, strict=True):
                    plgpu.copy_gmem_to_smem(source.at[pl.ds(tile * X, X)], target.at[slot],
                                            by_row.full.at[slot])
                first = group_gmem[tile] * (steps * step_rows)

                def step(c, _):
                    slot = by_key.acquire(i * steps + c)
                    part = pl.ds(pl.multiple_of(first + c * step_rows, HALF), step_rows)
                    mine = pl.ds(pl.multiple_of((tile * steps + c) * X, X), X)
                    for owned, source, target in zip(by_tile, keyed_gmem, keyed_smem, strict=True):
                        plgpu.copy_gmem_to_smem(source.at[mine if owned else part],
                                                target.at[slot], by_key.full.at[slot])

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, tiles, fill, None)

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(warpgroup * HALF, HALF)

            def store(values, memory, targets, tile, rows):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for value, smem in zip(values, memory, strict=True):
                    smem.at[warpgroup][...] = value.astype(smem.dtype)
                plgpu.commit_smem()
                where = pl.ds((tile * 2 + warpgroup) * rows, rows)
                for smem, target in zip(memory, targets, strict=True):
                    plgpu.copy_smem_to_gmem(smem.at[warpgroup, pl.ds(0, rows)], target.at[where],
                                            commit_group=False)
                plgpu.commit_smem_to_gmem_group()

            def multiply(i, _):
                tile = core + i * cores
                slot = by_row.wait(i)

                def keys(c, use):
                    count = i * steps + c
                    slot = by_key.wait(count)
                    seen = [x.at[slot, mine] if split or owned else x.at[slot]
                            for owned, x in zip(by_tile, keyed_smem, strict=True)]
                    result = use(*seen)
                    by_key.release(count)
                    return result

                def emit(c, values):
                    store(values, part_smem, parts_gmem, tile * steps + c, HALF)

                made = [products.of(sums, warpgroup)] if products else []
                results = attend([x.at[slot, mine] for x in rows_smem], keys, emit,
                                 [x.at[warpgroup] for x in scratch_smem], *made)
                by_row.release(i)
                if outs:
                    store(results, out_smem, outs_gmem, tile, kept)

            lax.fori_loop(0, tiles, multiply, None)
            plgpu.wait_smem_to_gmem(0)

    memory = dict(
        rows_smem=[_memory((row_slots, X, *x.shape[1:]), x.dtype, row) for x in rows],
        keyed_smem=[_memory((key_slots, n, *x.shape[1:]), x.dtype, row)
                    for n, arrays in ((step_rows, keyed), (X, own)) for x in arrays],
        out_smem=[_memory((2, HALF, *x.shape[1:]), x.dtype, row) for x in outs],
        part_smem=[_memory((2, HALF, *x.shape[1:]), x.dtype, row) for x in part_outs],
        scratch_smem=[shared((2, *shape), jnp.bfloat16, row) for shape in scratch],
        rows_bar=barriers(len(rows), row_slots),
        keys_bar=barriers(len(keyed) + len(own), key_slots),
        sums=products.scratch() if products else None,
    )
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*outs, *part_outs)]
    return launch(body, results, memory)(group, used, *rows, *keyed, *own)
