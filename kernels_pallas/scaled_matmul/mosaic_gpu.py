"""scaled_matmul on Hopper's 8-bit tensor cores, dense and grouped, forward and both gradients.

Tensor cores add up E4M3 products with about 14 bits, so that their sum over every 128 of the
contracted dim is brought to float32 registers, scaled there and added; while one warpgroup does
that, the other's products run. 8-bit operands are multiplied along their last dim only.
Blackwell's kernels are in mosaic_gpu_blackwell.py; what is around both is in derivative.py, the
letters too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper, products
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.hopper import HALF
from kernels_pallas.scaled_matmul import derivative, gpu_plan
from kernels_pallas.scaled_matmul.tiles import E4M3, TILE

_F32 = jnp.float32
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SHAPE = (HALF, TILE)  # of a warpgroup's part of a tile


def _promoted(ring, tile, done, a_smem, b_smem, row_smem, scale):
    """Return 64 rows of a tile of x8 w8 with every stage's sum scaled: scale(step, slot, part)."""
    mine = pl.ds(lax.axis_index("warpgroup") * HALF, HALF)

    def stage(k, total):
        slot = ring.wait(done + k)
        by_stage = scale(k, slot)

        def product(acc):
            plgpu.wgmma(acc, a_smem.at[slot, mine], b_smem.at[slot].transpose((1, 0)))
            return acc[...]

        part = pl.run_scoped(product, plgpu.ACC(_SHAPE, _F32))
        by_row = plgpu.load(row_smem.at[slot, mine], layout=_BY_ROW)
        total = total + by_stage(part, by_row)
        plgpu.commit_smem()  # the copy engine may write where scales were read
        ring.release(done + k)
        return total

    zeros = plgpu.layout_cast(jnp.zeros(_SHAPE, _F32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, tile.steps, stage, zeros)


def _rows_times(a_RxK, a_scale, b_ExNxK, b_scale, layout, dtype):
    """Rows times the transpose of their expert's matrix, [R, N] in dtype.

    Shapes: a_scale [K / 128, R], b_scale [E, N / 128, K / 128].
    """
    (R, K), N = a_RxK.shape, b_ExNxK.shape[1]
    grain, cores = grouped.grain(layout), device.target().cores
    items, count = grouped.row_items(layout)
    n_tiles, steps = N // TILE, K // TILE
    across = grouped.across(n_tiles)
    stages = gpu_plan.stages(jnp.dtype(dtype).itemsize, 1)

    def body(items_gmem, count_gmem, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, *, a_smem,
             b_smem, row_smem, out_smem, full, empty):
        ring = hopper.Ring(full, empty, stages)

        def decode(number):
            return products.row_tile(number, items_gmem, count_gmem[0], across, n=TILE,
                                     grain=grain, steps=steps)

        def load(tile, k, slot):
            rows, contracted = pl.ds(tile.first, TILE), pl.ds(k * TILE, TILE)
            for source, target in (
                    (a_gmem.at[rows, contracted], a_smem),
                    (b_gmem.at[tile.expert, pl.ds(tile.n, TILE), contracted], b_smem),
                    (a_scale_gmem.at[k, rows], row_smem)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        def accumulate(tile, done):
            def scale(k, slot):
                del slot
                # asked for before the products are issued, and there when they are done
                by_block = b_scale_gmem[tile.expert, lax.div(tile.n, hopper.i32(TILE)), k]

                def by_stage(part, by_row):
                    return part * hopper.spread(by_row * by_block, _SHAPE, 0)

                return by_stage

            return _promoted(ring, tile, done, a_smem, b_smem, row_smem, scale)

        def place(tile, column, smem):
            first = tile.first + lax.axis_index("warpgroup") * HALF
            columns = pl.ds(tile.n + column, grouped.COLUMNS)
            products.store_rows(smem, y_gmem, first, columns, tile.rows, grain)

        products.in_turns(
            decode, load, accumulate,
            lambda tile, result: products.write_tile(tile, result, place, out_smem),
            ring=ring, cores=cores, total=count_gmem[0] * n_tiles)

    stage = {"a_smem": ((TILE, TILE), E4M3), "b_smem": ((TILE, TILE), E4M3),
             "row_smem": ((TILE,), _F32)}
    kernel = products.launch(body, jax.ShapeDtypeStruct((R, N), dtype), stages=stages, stage=stage,
                             out_smem=products.result_memory(dtype), cores=cores)
    return kernel(items, count, a_RxK, a_scale, b_ExNxK, b_scale)


def group_tile(groups, m_tiles, n_tiles, n, number):
    """Decode a tile of 128 x n of the groups' gradients, `groups` as tiles.row_tiles has."""
    item = lax.div(number, hopper.i32(m_tiles * n_tiles))
    within = number - item * (m_tiles * n_tiles)
    m = lax.div(within, hopper.i32(n_tiles))
    return products.Tile(
        expert=groups[item, 0], first=groups[item, 1], steps=groups[item, 2], writes=True,
        m=pl.multiple_of(m * TILE, TILE), n=pl.multiple_of((within - m * n_tiles) * n, n))


def _contracted(a_DxP, a_scale, b_FxP, b_scale, groups, dtype):
    """Each expert's a b^T over its tiles of 128 rows, [E, D, F] in dtype.

    Shapes: P counts rows in tiles of 128; a_scale [P / 128, D], b_scale [P / 128, F]; groups [E, 3]
    as tiles.row_tiles has them.
    """
    (D, _), F, E = a_DxP.shape, b_FxP.shape[0], groups.shape[0]
    cores = device.target().cores
    m_tiles, n_tiles = D // TILE, F // TILE
    stages = gpu_plan.stages(jnp.dtype(dtype).itemsize, 2)

    def body(groups_gmem, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, *, a_smem, b_smem,
             row_smem, column_smem, out_smem, full, empty):
        ring = hopper.Ring(full, empty, stages)

        def load(tile, k, slot):
            at = tile.first + k
            contracted = pl.ds(pl.multiple_of(at * TILE, TILE), TILE)
            rows, columns = pl.ds(tile.m, TILE), pl.ds(tile.n, TILE)
            for source, target in (
                    (a_gmem.at[rows, contracted], a_smem), (b_gmem.at[columns, contracted], b_smem),
                    (a_scale_gmem.at[at, rows], row_smem),
                    (b_scale_gmem.at[at, columns], column_smem)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        def accumulate(tile, done):
            def scale(k, slot):
                del k

                def by_stage(part, by_row):
                    by_column = plgpu.load(column_smem.at[slot], layout=_BY_COLUMN)
                    part = part * hopper.spread(by_row, _SHAPE, 0)
                    return part * hopper.spread(by_column, _SHAPE, 1)

                return by_stage

            return _promoted(ring, tile, done, a_smem, b_smem, row_smem, scale)

        def place(tile, column, smem):
            rows = pl.ds(tile.m + lax.axis_index("warpgroup") * HALF, HALF)
            columns = pl.ds(tile.n + column, grouped.COLUMNS)
            plgpu.copy_smem_to_gmem(smem, y_gmem.at[tile.expert, rows, columns],
                                    commit_group=False)

        products.in_turns(
            functools.partial(group_tile, groups_gmem, m_tiles, n_tiles, TILE), load, accumulate,
            lambda tile, result: products.write_tile(tile, result, place, out_smem),
            ring=ring, cores=cores, total=hopper.i32(E * m_tiles * n_tiles))

    stage = {"a_smem": ((TILE, TILE), E4M3), "b_smem": ((TILE, TILE), E4M3),
             "row_smem": ((TILE,), _F32), "column_smem": ((TILE,), _F32)}
    kernel = products.launch(body, jax.ShapeDtypeStruct((E, D, F), dtype), stages=stages,
                             stage=stage, out_smem=products.result_memory(dtype), cores=cores)
    return kernel(groups, a_DxP, a_scale, b_FxP, b_scale)


scaled_matmul = functools.partial(
    derivative.scaled_matmul, kernels=derivative.Kernels(_rows_times, _contracted))
