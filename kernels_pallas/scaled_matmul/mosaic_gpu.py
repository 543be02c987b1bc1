"""scaled_matmul on Hopper's 8-bit tensor cores, dense and grouped, forward and both gradients.

Numbers are rounded to E4M3 by XLA before the kernels. Tensor cores add up E4M3 products with about
14 bits, so that their sum over every 128 of the contracted dim is brought to float32 registers,
scaled there and added; while one warpgroup does that, the other's products run. 8-bit operands are
multiplied along their last dim only: XLA writes transposes of what is contracted along another.
Blackwell's kernels are in mosaic_gpu_blackwell.py; what is around both is here.
Letters beside the house's: K the contracted dim and N the result's columns, in whole tiles of 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper, products
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.grouped_matmul.layout import contiguous
from kernels_pallas.hopper import HALF
from kernels_pallas.scaled_matmul import gpu_plan
from kernels_pallas.scaled_matmul.gpu_plan import whole
from kernels_pallas.scaled_matmul.tiles import E4M3, TILE, quantize

ROW, BLOCK, COLUMN = (1, TILE), (TILE, TILE), (TILE, 1)
_F32 = jnp.float32
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SHAPE = (HALF, TILE)  # of a warpgroup's part of a tile


def _fill(x, *lengths):
    """Zeros up to these lengths of the last dims."""
    widths = [(0, 0)] * (x.ndim - len(lengths))
    widths += [(0, n - have) for n, have in zip(lengths, x.shape[-len(lengths):], strict=True)]
    return jnp.pad(x, widths) if any(map(any, widths)) else x


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
    """Decode a tile of 128 x n of the groups' gradients, `groups` as gpu_plan.row_tiles has."""
    item = lax.div(number, hopper.i32(m_tiles * n_tiles))
    within = number - item * (m_tiles * n_tiles)
    m = lax.div(within, hopper.i32(n_tiles))
    return products.Tile(
        expert=groups[item, 0], first=groups[item, 1], steps=groups[item, 2], writes=True,
        m=pl.multiple_of(m * TILE, TILE), n=pl.multiple_of((within - m * n_tiles) * n, n))


def _contracted(a_DxP, a_scale, b_FxP, b_scale, groups, dtype):
    """Each expert's a b^T over its tiles of 128 rows, [E, D, F] in dtype.

    Shapes: P counts rows in tiles of 128; a_scale [P / 128, D], b_scale [P / 128, F]; groups [E, 3]
    as gpu_plan.row_tiles has them.
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


# Around the kernels.


class Kernels(NamedTuple):
    """A generation's two kernels."""

    rows_times: Callable[..., jax.Array]
    contracted: Callable[..., jax.Array]


_HOPPER = Kernels(_rows_times, _contracted)


def _product(kernels: Kernels, x_RxK, w_ExKxN, layout, power_of_two, *, transposed=False):
    """Rows times their expert's matrix, or the transpose of its [N, K]: [R, N] in x's dtype."""
    K, N = w_ExKxN.shape[:0:-1] if transposed else w_ExKxN.shape[1:]
    a, a_scale = quantize(_fill(x_RxK, whole(K)), ROW, power_of_two)
    b, b_scale = quantize(_fill(w_ExKxN, *map(whole, w_ExKxN.shape[1:])), BLOCK, power_of_two)
    if not transposed:
        b, b_scale = (jnp.swapaxes(x, 1, 2) for x in (b, b_scale))
    y = kernels.rows_times(a, a_scale.T, b, b_scale, layout, x_RxK.dtype)
    return y[:, :N]


def _weight_gradient(kernels: Kernels, x_RxD, dy_RxF, layout, power_of_two, dtype):
    """Each group's x^T dy, by tiles of 128 of its rows: [E, D, F] in dtype."""
    row, mine, groups = gpu_plan.row_tiles(layout)

    def columns(a):
        """Return a by column [whole D, P] in 8 bits, and the scales of its tiles [P / 128, D]."""
        wide = _fill(a, whole(a.shape[1]))
        rows = jnp.where(mine.reshape(-1, 1), wide[row.reshape(-1)], jnp.zeros((), a.dtype))
        q, scale = quantize(rows, COLUMN, power_of_two)
        return q.T, scale

    dw = kernels.contracted(*columns(x_RxD), *columns(dy_RxF), groups, dtype)
    return dw[:, :x_RxD.shape[1], :dy_RxF.shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _grouped(kernels, x, w, layout, power_of_two):
    return _product(kernels, x, w, layout, power_of_two)


def _forward(kernels, x, w, layout, power_of_two):
    return _product(kernels, x, w, layout, power_of_two), (x, w, layout)


def _backward(kernels, power_of_two, kept, dy):
    x, w, layout = kept
    dx = _product(kernels, dy, w, layout, power_of_two, transposed=True)
    return dx, _weight_gradient(kernels, x, dy, layout, power_of_two, w.dtype), None


_grouped.defvjp(_forward, _backward)


def scaled_matmul(x, w, layout=None, *, power_of_two=False, kernels=_HOPPER):
    """Round by XLA and multiply in 8 bits; a dense product is that of one group of all rows."""
    if layout is not None:
        return _grouped(kernels, x, w, layout, power_of_two)
    rows = x.reshape(-1, x.shape[-1])
    R = rows.shape[0]
    # whole tiles: the last rows of a tile that reach beyond an array would be read as they are
    rows = jnp.pad(rows, ((0, -R % TILE), (0, 0)))
    layout = contiguous(jnp.full(1, R, jnp.int32), jnp.zeros(1, jnp.int32), rows.shape[0], TILE)
    y = _grouped(kernels, rows, w[None], layout, power_of_two)[:R]
    return y.reshape(*x.shape[:-1], w.shape[-1])
