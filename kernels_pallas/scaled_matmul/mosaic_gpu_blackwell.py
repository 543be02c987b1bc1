"""scaled_matmul on Blackwell's 8-bit tensor cores, dense and grouped, forward and both gradients.

The kernels return what Hopper's return, and all around them is shared (derivative.py). The products
of every 128 of the contracted dim go to a place of tensor memory of their own; two warpgroups, each
with half of a tile's columns, take them from there, scale them and add them up in registers, while
the next 128 are multiplied into the other place.

Why not the scales that these tensor cores apply themselves (mxfp8): those are powers of two, one
for every 32 numbers of a row. Ours are float32, one for every 128: largest / 448 lies anywhere
between two powers of two, of which the nearest is off by a factor of up to sqrt(2); with the next
larger one, and numbers rounded anew for it, it is another op: `power_of_two=True`. That one they
could serve (four equal scales in place of one, from 2^-126 up, and no sums to bring out every 128),
but JAX's interpreter has no such scales (gpu_callbacks.TcGen05Mma asserts that there are none), so
that it could not be tested here.

By arithmetic, 128 x 256 x 128 products take 512 cycles, for which 96 bytes a cycle are read of the
128 that shared memory gives; their 32,768 sums take 256 cycles of all lanes, a multiply-add each,
and 512 of the weights' gradient, whose columns have scales too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, device, hopper, products
from kernels_pallas.blackwell import LOADS, MULTIPLIES, WRITES
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.grouped_matmul.tiles import COLUMNS
from kernels_pallas.scaled_matmul import derivative, gpu_plan, mosaic_gpu
from kernels_pallas.scaled_matmul.tiles import E4M3, TILE

_F32 = jnp.float32
_LAYOUT = plgpu.Layout.TCGEN05
_BY_ROW, _BY_COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_SHAPE = (TILE, COLUMNS)  # of sums that are scaled at once
_WRITERS = 2
# A thread's registers by warpgroup: 128 at entry, of which those that sum are given most.
_LOADING, _MULTIPLYING, _SUMMING = 24, 40, 224


def _in_turns(decode, load, scales, finish, *, n, a_smem, b_smem, ring, sums, total):
    """One program's share of the tiles: every `cores`-th.

    `decode(number)` gives a tile, with the number of its `steps` and whether it `writes` anything;
    `load(tile, step, slot)` starts the copies of a stage; `scales(tile, step, first)` reads what a
    warpgroup's columns from `first` of the tile on are scaled by and returns scaled(part, column);
    `finish(tile, first, take)` writes them, take(column) being their sums [128, 64].
    """
    core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
    cores, columns = device.target().cores, range(0, n // _WRITERS, COLUMNS)

    @pl.when(warpgroup == LOADS)
    def _():
        plgpu.set_max_registers(_LOADING, action="decrease")
        blackwell.fill(decode, load, ring=ring, cores=cores, total=total)

    @pl.when(warpgroup == MULTIPLIES)
    def _():
        plgpu.set_max_registers(_MULTIPLYING, action="decrease")

        def multiply(i, done):
            tile = decode(core + i * cores)

            def stage(k, _):
                turn = done + k
                place, slot = sums.acquire(turn), ring.wait(turn)
                plgpu.tcgen05_mma(place, a_smem.at[slot], b_smem.at[slot].transpose((1, 0)),
                                  accumulate=False)
                plgpu.tcgen05_commit_arrive(ring.empty.at[slot])
                sums.complete(turn)

            lax.fori_loop(0, tile.steps, stage, None)
            return done + tile.steps

        lax.fori_loop(0, hopper.share(total), multiply, hopper.i32(0))

    @pl.when(warpgroup >= WRITES)
    def _():
        plgpu.set_max_registers(_SUMMING, action="increase")
        first = pl.multiple_of((warpgroup - WRITES) * (n // _WRITERS), COLUMNS)

        def produce(i, done):
            tile = decode(core + i * cores)

            def stage(k, totals):
                # asked for before the products are done, and there when they are
                scaled = scales(tile, k, first)
                place = sums.wait(done + k)
                totals = [
                    total + scaled(plgpu.async_load_tmem(
                        place.at[:, pl.ds(first + column, COLUMNS)], layout=_LAYOUT), column)
                    for column, total in zip(columns, totals, strict=True)]
                sums.release(done + k)
                return totals

            zeros = plgpu.layout_cast(jnp.zeros(_SHAPE, _F32), _LAYOUT)
            totals = lax.fori_loop(0, tile.steps, stage, [zeros for _ in columns])
            pl.when(tile.writes)(lambda: finish(tile, first, lambda c: totals[c // COLUMNS]))
            return done + tile.steps

        lax.fori_loop(0, hopper.share(total), produce, hopper.i32(0))
        plgpu.wait_smem_to_gmem(0)


def _write(n, first, take, place, out_smem):
    """Write a warpgroup's columns of a tile by its part of the memory [2, 1, 128, 64]."""
    memory = out_smem.at[lax.axis_index("warpgroup") - WRITES]
    blackwell.write_tile(n // _WRITERS, take, lambda c, smem: place(first + c, smem), memory)


def _launch(body, out, n):
    stage = {"a_smem": ((TILE, TILE), E4M3), "b_smem": ((n, TILE), E4M3)}
    return blackwell.launch(
        body, out, stages=gpu_plan.wide_stages(out.dtype.itemsize, n), stage=stage, width=n,
        out_smem=hopper.shared((_WRITERS, 1, TILE, COLUMNS), out.dtype),
        cores=device.target().cores, writers=_WRITERS)


def _rows_times(a_RxK, a_scale, b_ExNxK, b_scale, layout, dtype):
    """Rows times the transpose of their expert's matrix, [R, N] in dtype.

    Shapes: a_scale [K / 128, R], b_scale [E, N / 128, K / 128].
    """
    (R, K), N = a_RxK.shape, b_ExNxK.shape[1]
    grain, n = grouped.grain(layout), gpu_plan.width(N)
    items, count = grouped.row_items(layout)
    n_tiles, steps = -(-N // n), K // TILE
    across = grouped.across(n_tiles)
    # 16 pieces one after another spilled 16 bytes, and a loop over two or four spilled 128
    many_pieces = TILE > 8 * grain

    def body(items_gmem, count_gmem, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, *, a_smem,
             b_smem, out_smem, ring, sums):
        def decode(number):
            return products.row_tile(number, items_gmem, count_gmem[0], across, n=n, grain=grain,
                                     steps=steps, before=0)

        def load(tile, k, slot):
            contracted = pl.ds(k * TILE, TILE)
            for source, target in (
                    (a_gmem.at[pl.ds(tile.first, TILE), contracted], a_smem),
                    (b_gmem.at[tile.expert, pl.ds(tile.n, n), contracted], b_smem)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ring.full.at[slot])

        def scales(tile, k, first):
            # where only the first of two blocks of columns exists, nothing is written of the other
            block = jnp.minimum(lax.div(tile.n + first, hopper.i32(TILE)), N // TILE - 1)
            by_row = plgpu.load(a_scale_gmem.at[k, pl.ds(tile.first, TILE)], layout=_BY_ROW)
            by_row = by_row * b_scale_gmem[tile.expert, block, k]
            return lambda part, column: part * hopper.spread(by_row, _SHAPE, 0)

        def finish(tile, first, take):
            def place(column, smem):
                columns = pl.ds(tile.n + column, COLUMNS)
                products.store_rows(smem, y_gmem, tile.first, columns, tile.rows, grain, TILE,
                                    rolled=many_pieces)

            pl.when(tile.n + first < N)(lambda: _write(n, first, take, place, out_smem))

        _in_turns(decode, load, scales, finish, n=n, a_smem=a_smem, b_smem=b_smem, ring=ring,
                  sums=sums, total=count_gmem[0] * n_tiles)

    # a tile's rows may reach beyond the array, where the copy engine reads zeros
    a_scale = jnp.pad(a_scale, ((0, 0), (0, TILE)))
    kernel = _launch(body, jax.ShapeDtypeStruct((R, N), dtype), n)
    return kernel(items, count, a_RxK, a_scale, b_ExNxK, b_scale)


def _contracted(a_DxP, a_scale, b_FxP, b_scale, groups, dtype):
    """Each expert's a b^T over its tiles of 128 rows, [E, D, F] in dtype.

    Shapes: P counts rows in tiles of 128; a_scale [P / 128, D], b_scale [P / 128, F]; groups [E, 3]
    as tiles.row_tiles has them.
    """
    (D, _), F, E = a_DxP.shape, b_FxP.shape[0], groups.shape[0]
    n = gpu_plan.width(F)
    m_tiles, n_tiles = D // TILE, -(-F // n)

    def body(groups_gmem, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, *, a_smem, b_smem,
             out_smem, ring, sums):
        def load(tile, k, slot):
            contracted = pl.ds(pl.multiple_of((tile.first + k) * TILE, TILE), TILE)
            for source, target in ((a_gmem.at[pl.ds(tile.m, TILE), contracted], a_smem),
                                   (b_gmem.at[pl.ds(tile.n, n), contracted], b_smem)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ring.full.at[slot])

        def scales(tile, k, first):
            at = tile.first + k
            by_row = plgpu.load(a_scale_gmem.at[at, pl.ds(tile.m, TILE)], layout=_BY_ROW)
            by_column = [
                plgpu.load(b_scale_gmem.at[at, pl.ds(tile.n + first + column, COLUMNS)],
                           layout=_BY_COLUMN)
                for column in range(0, n // _WRITERS, COLUMNS)]

            def scaled(part, column):
                part = part * hopper.spread(by_row, _SHAPE, 0)
                return part * hopper.spread(by_column[column // COLUMNS], _SHAPE, 1)

            return scaled

        def finish(tile, first, take):
            def place(column, smem):
                rows, columns = pl.ds(tile.m, TILE), pl.ds(tile.n + column, COLUMNS)
                plgpu.copy_smem_to_gmem(smem, y_gmem.at[tile.expert, rows, columns],
                                        commit_group=False)

            pl.when(tile.n + first < F)(lambda: _write(n, first, take, place, out_smem))

        _in_turns(functools.partial(mosaic_gpu.group_tile, groups_gmem, m_tiles, n_tiles, n), load,
                  scales, finish, n=n, a_smem=a_smem, b_smem=b_smem, ring=ring, sums=sums,
                  total=hopper.i32(E * m_tiles * n_tiles))

    b_scale = jnp.pad(b_scale, ((0, 0), (0, n_tiles * n - F)))
    kernel = _launch(body, jax.ShapeDtypeStruct((E, D, F), dtype), n)
    return kernel(groups, a_DxP, a_scale, b_FxP, b_scale)


scaled_matmul = functools.partial(
    derivative.scaled_matmul, kernels=derivative.Kernels(_rows_times, _contracted))
