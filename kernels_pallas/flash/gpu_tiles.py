"""How Hopper's kernels of flash go through their tiles: one warpgroup loads, two multiply.

Arrays lie as they are given: [B, rows, heads, width], numbers of a head's rows [B, heads, rows],
and what is the same for all heads [B, rows].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.flash.gpu_plan import HALF, STEP, X
from kernels_pallas.hopper import i32


class Loaded(NamedTuple):
    """What of a step comes together: wait() returns it, release(read) gives its memory back.

    `read`: not only products read it, but loads too.
    """

    wait: Any
    release: Any


class Tile(NamedTuple):
    """What a warpgroup computes: 64 `rows` from `row` on, by the steps its `edges` tell of.

    `turn()` waits until the other warpgroup says it too, where they alternate.
    """

    row: Any
    rows: Any
    edges: Any
    turn: Any


def part(ref, b, h, row, size):
    """Return some rows of a head."""
    rows = pl.ds(pl.multiple_of(row, 8), size)
    if len(ref.shape) == 4:
        return ref.at[b, rows, h]
    return ref.at[b, h, rows] if len(ref.shape) == 3 else ref.at[b, rows]


def bytes_of(arrays, rows):
    """Return the bytes of shared memory of some rows."""
    return rows * sum((x.shape[3] if x.ndim == 4 else 1) * x.dtype.itemsize for x in arrays)


def over_tiles(attend, edges, fixed, streamed, outs, *, turns=1, heads=1, scalars=(), scratch=(),
               registers=(40, 232), size=STEP, late=0, alternate=False):
    """A kernel that calls `attend` for every tile of X rows of `fixed` arrays, head by head.

    Each meets `size` rows of `streamed` at a time, steps [edges[b, tile, 0], edges[b, tile, -1]):
    of the one head that so many `heads` of the fixed share, or in `turns` of several heads. `outs`
    are shapes like fixed arrays; those of rows leave by the memory of the fixed array of the same
    number, at least as wide. `scalars` are arrays that are read where they lie; `scratch` shapes of
    bfloat16 memory of each warpgroup.

    attend(tile, head, stream, scalars, scratch) returns the values of `outs` of 64 rows;
    stream(turn, step) returns the tile's rows and a Loaded for what is streamed, or two: the last
    `late` of it come and go on their own. All steps are to be met in order, and let go.

    With `alternate` each warpgroup calls tile.turn() twice in every step, the second of them half a
    step behind the first, so that one multiplies while the other does what comes between.
    """
    B, rows, lanes = fixed[0].shape[:3]
    tiles = rows // X
    numbers = [x for x in outs if len(x.shape) == 3]
    left = hopper.SHARED - hopper.BARRIERS - 1024 * (len(fixed) + len(streamed) + len(scratch))
    left -= 2 * HALF * 4 * len(numbers) + 2 * sum(2 * math.prod(shape) for shape in scratch)
    per_tile, per_step = bytes_of(fixed, X), bytes_of(streamed, size)
    one, two = ((left - slots * per_tile) // per_step for slots in (1, 2))
    tile_slots = 2 if two >= min(one, 3) else 1
    step_slots = min(two if tile_slots == 2 else one, 6)
    assert step_slots >= 1, f"{left} bytes for {per_tile} and {per_step}"
    early = len(streamed) - late

    def body(zero_gmem, edges_gmem, *refs, fixed_smem, streamed_smem, numbers_smem, scratch_smem,
             tile_bar, step_bar, late_bar, turn_bar):
        ends = [len(scalars), len(scalars) + len(fixed)]
        ends.append(ends[1] + len(streamed))
        scalars_gmem, fixed_gmem = refs[:ends[0]], refs[ends[0]:ends[1]]
        streamed_gmem, outs_gmem = refs[ends[1]:ends[2]], refs[ends[2]:]
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        cores = device.target().cores
        zero = zero_gmem[0]
        by_tile, by_step = hopper.Ring(*tile_bar, tile_slots), hopper.Ring(*step_bar, step_slots)
        rings = [(by_step, slice(0, early))]
        if late:
            rings.append((hopper.Ring(*late_bar, step_slots), slice(early, None)))
        share = hopper.share(i32(B * lanes * tiles))

        def decode(i):
            """(batch row, head, tile): the last tiles first, which see most where it is causal."""
            number = core + i * cores
            tile = lax.div(number, i32(B * lanes))
            lane = number - tile * (B * lanes)
            b = lax.div(lane, i32(lanes))
            return b, lane - b * lanes, (tiles - 1) - tile

        def bounds(b, tile):
            return edges_gmem[b, tile, 0], edges_gmem[b, tile, edges.shape[2] - 1]

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(registers[0], action="decrease")

            def fill(i, done):
                b, h, tile = decode(i)
                slot = by_tile.acquire(i)
                for source, target in zip(fixed_gmem, fixed_smem, strict=True):
                    plgpu.copy_gmem_to_smem(part(source, b, h, tile * X, X), target.at[slot],
                                            by_tile.full.at[slot])
                low, high = bounds(b, tile)

                def turn(g, done):
                    head = lax.div(h, i32(heads)) * turns + g

                    def step(s, _):
                        for ring, those in rings:
                            slot = ring.acquire(done + s - low)
                            for source, target in zip(streamed_gmem[those], streamed_smem[those],
                                                      strict=True):
                                plgpu.copy_gmem_to_smem(part(source, b, head, s * size, size),
                                                        target.at[slot], ring.full.at[slot])

                    lax.fori_loop(low, high, step, None)
                    return done + high - low

                return lax.fori_loop(0, turns, turn, done)

            lax.fori_loop(0, share, fill, i32(0))

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(registers[1], action="increase")
            mine = pl.ds(warpgroup * HALF, HALF)

            def turn():
                if alternate:
                    plgpu.barrier_arrive(turn_bar)
                    plgpu.barrier_wait(turn_bar)

            def multiply(i, done):
                b, h, tile = decode(i)
                slot = by_tile.wait(i)
                low, high = bounds(b, tile)

                def rows(zero=0):
                    return [x.at[slot + zero, mine] for x in fixed_smem]

                def loaded(ring, those, count):
                    def wait():
                        slot = ring.wait(count)
                        return [x.at[slot] for x in streamed_smem[those]]

                    def release(read=False):
                        if read:  # loads are not of the copies' proxy, which writes here next
                            plgpu.commit_smem()
                        ring.release(count)

                    return Loaded(wait, release)

                def stream(g, s):
                    # Of memory known before the loop over steps the compiler works out the address
                    # of every operand ahead, 64 bits each, and spills them: it is not told that
                    # s & zero is 0.
                    count = done + g * (high - low) + s - low
                    return rows(s & zero), *(loaded(*ring, count) for ring in rings)

                row = tile * X + warpgroup * HALF
                known = Tile(row, rows(), lambda n: edges_gmem[b, tile, n], turn)
                # As many turns each, the second's half a step later. Not beyond a tile, whose
                # memory may be needed for the next: neither is to wait for the other's next tile.
                pl.when(warpgroup == 1)(turn)
                results = attend(known, (b, h), stream, scalars_gmem,
                                 [x.at[warpgroup] for x in scratch_smem])
                pl.when(warpgroup == 0)(turn)
                memory = iter(numbers_smem)
                for n, (value, target) in enumerate(zip(results, outs_gmem, strict=True)):
                    if len(target.shape) == 3:
                        number = next(memory).at[warpgroup]
                        number[...] = value
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(number, part(target, b, h, row, HALF),
                                                commit_group=False)
                    else:
                        _send(value, known.rows[n], target, b, h, row)
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                by_tile.release(i)
                return done + turns * (high - low)

            lax.fori_loop(0, share, multiply, i32(0))
            plgpu.wait_smem_to_gmem(0)

    def memory(slots, rows, x):
        if x.ndim == 4:
            return hopper.shared((slots, rows, x.shape[3]), x.dtype)
        return plgpu.SMEM((slots, rows), x.dtype)

    scratches = dict(
        fixed_smem=[memory(tile_slots, X, x) for x in fixed],
        streamed_smem=[memory(step_slots, size, x) for x in streamed],
        numbers_smem=[plgpu.SMEM((2, HALF), x.dtype) for x in numbers],
        scratch_smem=[hopper.shared((2, *shape), jnp.bfloat16) for shape in scratch],
        tile_bar=hopper.barriers(len(fixed), tile_slots),
        step_bar=hopper.barriers(early, step_slots),
        late_bar=hopper.barriers(late, step_slots) if late else None,
        turn_bar=plgpu.Barrier(num_arrivals=2) if alternate else None,
    )
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs]
    kernel = hopper.launch(body, results, scratches)
    return kernel(jnp.zeros(1, jnp.int32), edges, *scalars, *fixed, *streamed)


def _send(value, memory, target, b, h, row):
    """Write 64 rows by way of this memory, the first columns of it."""
    width = value.shape[1]
    if width == memory.shape[1]:
        memory[...] = value.astype(memory.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, part(target, b, h, row, HALF), commit_group=False)
        return
    columns = pl.ds(0, width)
    memory.at[:, columns][...] = value.astype(memory.dtype)
    plgpu.commit_smem()
    for n in range(0, HALF, 8):  # some columns of 8 rows are one piece of memory
        plgpu.copy_smem_to_gmem(memory.at[pl.ds(n, 8), columns],
                                part(target, b, h, row + n, 8), commit_group=False)
