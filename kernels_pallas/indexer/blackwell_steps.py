"""Keys times queries' heads on Blackwell, 128 by 128 at a time, and what is added up of them.

A tile goes through steps: of each the product of 128 keys and the heads of two queries, 64 columns
each, is taken out of tensor memory and bent into weights of those pairs, which are multiplied on.
One warpgroup loads, one issues products, the next step's before those with what is bent, and one
bends and writes. Every sum has one order: the same bits every time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, device, hopper
from kernels_pallas.blackwell import by_tensor_cores
from kernels_pallas.hopper import BARRIERS, HALF, SHARED, X
from kernels_pallas.indexer import mosaic_gpu

_F32, _BF16 = jnp.float32, jnp.bfloat16
_LAYOUT = plgpu.Layout.TCGEN05
_ROW, _COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_HALVES = (pl.ds(0, HALF), pl.ds(HALF, HALF))
_OUT_BYTES = 128 * X  # of what is written at once: rows of 128 bytes


def _slots(count, x):
    """Memory for so many of an array's 128 rows, or numbers of them."""
    shape = (count, X, *x.shape[1:])
    return hopper.shared(shape, x.dtype) if len(shape) > 2 else plgpu.SMEM(shape, x.dtype)


def _bytes(arrays):
    return X * sum(x.dtype.itemsize * (x.shape[1] if x.ndim > 1 else 1) for x in arrays)


def _raw(place, half):
    return plgpu.async_load_tmem(place.at[:, half], layout=_LAYOUT)


def score_steps(tiled, stepped, *, steps):
    """Return the score of every key [Z x steps x X] of a tile's two queries, 64 keys of each.

    Shapes: tiled q [Z x X, D] and w [Z x X]; stepped k [Z x steps x X, D].
    """
    return _over_steps(tiled, stepped, None, steps=steps, tiles_of=1)[0]


def gradient_steps(tiled, stepped, slope, *, steps, tiles_of, summed, each=None, kept=HALF,
                   dtype=_F32):
    """Return by tile the sum over steps of what a product with the weights is, and that by step.

    e[n, j] = slope[half of j, n] where k[n].q[j] is above 0, and 0 elsewhere. `summed` names what
    e, or with q and w by tile e^T, is multiplied with; `each` what e is, to be kept by step.

    Shapes: tiled [Z x X, D] and stepped [Z / tiles_of x steps x X, D], in which are k and q; slope
    [Z x steps x 2 x X] -> [Z x 2 x kept, D] in dtype, the first `kept` rows of each half, and with
    `each` [Z x steps x X, D] in bfloat16.
    """
    return _over_steps(tiled, stepped, slope, steps=steps, tiles_of=tiles_of, summed=summed,
                       each=each, kept=kept, dtype=dtype)


def _over_steps(tiled, stepped, slope, *, steps, tiles_of, summed=None, each=None, kept=HALF,
                dtype=_F32):
    arrays = tiled | stepped
    (_, D), cores = arrays["k"].shape, device.target().cores
    Z = next(iter(tiled.values())).shape[0] // X
    by_keys = "k" in tiled  # whose sums are keys', not heads'
    slopes, out_columns = slope is not None, 128 // jnp.dtype(dtype).itemsize
    bent_slots = int(slopes)
    left = SHARED - BARRIERS - _OUT_BYTES - bent_slots * 2 * X * X
    per_tile = _bytes(tiled.values())
    per_step = _bytes(stepped.values()) + 8 * X * slopes
    tile_slots = 2 if left >= 2 * per_tile + 3 * per_step else 1
    step_slots = min((left - tile_slots * per_tile) // per_step, 6)
    # products of a step are issued before the one before it is done with
    assert step_slots >= 2, f"{left} bytes for {per_tile} and {per_step}"

    def body(*refs, memory, slope_smem, bent_smem, out_smem, bars, sums_tmem, scores):
        sources = dict(zip(arrays, refs, strict=False))
        *more, = refs[len(arrays):]
        slope_gmem = more.pop(0) if slopes else None
        core = lax.axis_index("core")
        share = hopper.share(hopper.i32(Z))
        by_tile = hopper.Ring(*bars["tile"], tile_slots)
        by_step = hopper.Ring(*bars["step"], step_slots)
        raw = blackwell.Sums(*scores, X)
        bent = hopper.Ring(*bars["bent"], bent_slots) if slopes else None

        def load():
            def tile(i, _):
                number = core + i * cores
                slot = by_tile.acquire(i)
                for name in tiled:
                    plgpu.copy_gmem_to_smem(sources[name].at[pl.ds(number * X, X)],
                                            memory[name].at[slot], by_tile.full.at[slot])
                first = lax.div(number, hopper.i32(tiles_of)) * steps

                def step(c, _):
                    slot = by_step.acquire(i * steps + c)
                    for name in stepped:
                        rows = pl.ds(pl.multiple_of((first + c) * X, X), X)
                        plgpu.copy_gmem_to_smem(sources[name].at[rows], memory[name].at[slot],
                                                by_step.full.at[slot])
                    if slopes:
                        rows = pl.ds(pl.multiple_of((number * steps + c) * 2 * X, X), 2 * X)
                        plgpu.copy_gmem_to_smem(slope_gmem.at[rows], slope_smem.at[slot],
                                                by_step.full.at[slot])

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, share, tile, None)

        def multiply():
            def tile(i, _):
                tile_slot = by_tile.wait(i)

                def operand(name, step_slot):
                    return memory[name].at[tile_slot if name in tiled else step_slot]

                def weigh(c):
                    turn = i * steps + c
                    slot, e = by_step.slot(turn), bent_smem.at[bent.wait(turn)]

                    @pl.when((c == 0) & (i > 0))
                    def _():
                        plgpu.barrier_wait(bars["sum"][1])

                    plgpu.tcgen05_mma(sums_tmem[0], e if by_keys else e.transpose((1, 0)),
                                      operand(summed, slot), accumulate=c > 0)
                    if each:
                        @pl.when(turn > 0)
                        def _():
                            plgpu.barrier_wait(bars["each"][1])

                        plgpu.tcgen05_mma(sums_tmem[1], e, operand(each, slot), accumulate=False)
                        plgpu.tcgen05_commit_arrive(bars["each"][0])
                    plgpu.tcgen05_commit_arrive(bent.empty.at[bent.slot(turn)])
                    plgpu.tcgen05_commit_arrive(by_step.empty.at[slot])

                def step(c, _):
                    turn = i * steps + c
                    slot, place = by_step.wait(turn), raw.acquire(turn)
                    plgpu.tcgen05_mma(place, operand("k", slot),
                                      operand("q", slot).transpose((1, 0)), accumulate=False)
                    raw.complete(turn)
                    if slopes:
                        pl.when(c > 0)(lambda: weigh(c - 1))

                lax.fori_loop(0, steps, step, None)
                if slopes:
                    weigh(hopper.i32(steps - 1))
                    plgpu.tcgen05_commit_arrive(bars["sum"][0])
                    plgpu.tcgen05_commit_arrive(by_tile.empty.at[tile_slot])

            lax.fori_loop(0, share, tile, None)

        def bend(turn, slot):
            place, to = raw.wait(turn), bent_smem.at[bent.acquire(turn)]
            for h, half in enumerate(_HALVES):
                found = _raw(place, half)
                numbers = plgpu.load(slope_smem.at[slot, pl.ds(h * X, X)], layout=_ROW)
                weight = jnp.where(found > 0, hopper.spread(numbers, found.shape, 0),
                                   jnp.zeros_like(found))
                to.at[:, half][...] = weight.astype(_BF16)
            plgpu.commit_smem()
            raw.release(turn)
            plgpu.barrier_arrive(bent.full.at[bent.slot(turn)])

        def send(tmem, target, first, rows):
            """Write the first `rows` of each half of a sum."""
            def place(column, smem):
                for h in range(2):
                    plgpu.copy_smem_to_gmem(
                        smem.at[pl.ds(h * HALF, rows)],
                        target.at[pl.ds(first + h * rows, rows), pl.ds(column, smem.shape[1])],
                        commit_group=False)

            columns = out_smem.shape[2]
            blackwell.write_tile(D, lambda column: plgpu.async_load_tmem(
                tmem.at[:, pl.ds(column, columns)], layout=_LAYOUT), place, out_smem)

        def write():
            def tile(i, _):
                number = core + i * cores
                if not slopes:
                    tile_slot = by_tile.wait(i)

                def give(c):
                    plgpu.barrier_wait(bars["each"][0])
                    send(sums_tmem[1], more[1], (number * steps + c) * X, HALF)
                    plgpu.wait_load_tmem()
                    plgpu.barrier_arrive(bars["each"][1])

                def score(c, turn):
                    place = raw.wait(turn)
                    hits = []
                    for half in _HALVES:
                        w = plgpu.load(memory["w"].at[tile_slot, half], layout=_COLUMN)
                        found = jnp.maximum(_raw(place, half), 0)
                        hits.append(found * hopper.spread(w, found.shape, 1))
                    row = plgpu.broadcasted_iota(jnp.int32, hits[0].shape, 0, layout=_LAYOUT)
                    found = jnp.where(row < HALF, *hits).sum(axis=1)
                    raw.release(turn)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[...] = found
                    plgpu.commit_smem()
                    rows = pl.ds(pl.multiple_of((number * steps + c) * X, X), X)
                    plgpu.copy_smem_to_gmem(out_smem, more[0].at[rows])

                def step(c, _):
                    turn = i * steps + c
                    slot = by_step.wait(turn)
                    if slopes:
                        bend(turn, slot)
                    else:
                        score(c, turn)
                        by_step.release(turn)
                    if each:
                        pl.when(c > 0)(lambda: give(c - 1))

                lax.fori_loop(0, steps, step, None)
                if each:
                    give(steps - 1)
                if slopes:
                    plgpu.barrier_wait(bars["sum"][0])
                    send(sums_tmem[0], more[0], number * 2 * kept, kept)
                    plgpu.wait_load_tmem()
                    plgpu.barrier_arrive(bars["sum"][1])
                else:
                    by_tile.release(i)

            lax.fori_loop(0, share, tile, None)
            plgpu.wait_smem_to_gmem(0)

        blackwell.by_role(load, multiply, write)

    def ring(copies, slots):
        return plgpu.Barrier(num_arrivals=copies, num_barriers=slots), by_tensor_cores(slots)

    bars = {"tile": ring(len(tiled), tile_slots), "step": ring(len(stepped) + slopes, step_slots)}
    places = blackwell.places(X)
    if slopes:
        bars["bent"] = (by_tensor_cores(bent_slots), by_tensor_cores(bent_slots))
        bars["sum"] = bars["each"] = (by_tensor_cores(1), by_tensor_cores(1))
        outs = [jax.ShapeDtypeStruct((Z * 2 * kept, D), dtype)]
        outs += [jax.ShapeDtypeStruct((Z * steps * X, D), _BF16)] if each else []
        assert dtype == _BF16 or not each  # what is written at once is of one dtype
        out_smem = hopper.shared((1, X, out_columns), dtype)
    else:
        outs, out_smem = [jax.ShapeDtypeStruct((Z * steps * X,), _F32)], plgpu.SMEM((X,), _F32)
    scratch = dict(
        memory={name: _slots(tile_slots if name in tiled else step_slots, x)
                for name, x in arrays.items()},
        slope_smem=plgpu.SMEM((step_slots, 2 * X), _F32) if slopes else None,
        bent_smem=hopper.shared((bent_slots, X, X), _BF16) if slopes else None,
        out_smem=out_smem, bars=bars,
        sums_tmem=[plgpu.TMEM((X, D), _F32)] * (slopes + bool(each)),
        scores=(places["tmem"], places["full"], places["free"]),
    )
    return hopper.launch(body, outs, scratch, **mosaic_gpu.ALONG_ROWS)(
        *arrays.values(), *([slope] if slopes else []))
