"""grouped_matmul on Hopper's tensor cores: bfloat16, accumulated in float32, forward and backward.

How a program goes through its tiles is in `kernels_pallas/products.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, products
from kernels_pallas.grouped_matmul import tiles
from kernels_pallas.grouped_matmul.derivative import differentiable
from kernels_pallas.grouped_matmul.tiles import COLUMNS, TILE_K, TILE_M, Tiles
from kernels_pallas.hopper import HALF


def rows_times(xs, ws, layout, *, transposed):
    """The sum over x of xs and w of ws of x [R, K] times each expert's w [E, K, N]: [R, N].

    With `transposed` w is [E, N, K]. Their products follow one another in one accumulator.
    """
    R, K = xs[0].shape
    N = ws[0].shape[1] if transposed else ws[0].shape[2]
    plan = tiles.choose(layout, N, 2, product="transposed" if transposed else "rows",
                        contracted=K)
    items, count = tiles.row_items(layout)
    n_tiles, steps = -(-N // plan.n), K // TILE_K
    across = tiles.across(n_tiles)

    def body(items_gmem, count_gmem, *refs, a_smem, b_smem, out_smem, full, empty):
        *sources, y_gmem = refs
        pairs = list(zip(sources[::2], sources[1::2], strict=True))
        warpgroup = lax.axis_index("warpgroup")
        ring = hopper.Ring(full, empty, plan.stages)

        def decode(number):
            return products.row_tile(number, items_gmem, count_gmem[0], across, n=plan.n,
                                     grain=plan.grain, steps=len(pairs) * steps)

        def load(tile, k, slot):
            def start(i):
                x_gmem, w_gmem = pairs[i]
                contracted = pl.ds((k - i * steps) * TILE_K, TILE_K)
                plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(tile.first, TILE_M), contracted],
                                        a_smem.at[slot], full.at[slot])
                columns = pl.ds(tile.n, plan.n)
                where = (columns, contracted) if transposed else (contracted, columns)
                plgpu.copy_gmem_to_smem(w_gmem.at[tile.expert, *where], b_smem.at[slot],
                                        full.at[slot])

            if len(pairs) == 1:
                start(0)
                return
            for i in range(len(pairs)):
                pl.when((k >= i * steps) & (k < (i + 1) * steps))(functools.partial(start, i))

        def multiply(tile, k, slot, acc):
            b = b_smem.at[slot]
            plgpu.wgmma(acc, a_smem.at[slot, pl.ds(warpgroup * HALF, HALF)],
                        b.transpose((1, 0)) if transposed else b)

        def place(tile, column, smem):
            products.store_rows(smem, y_gmem, tile.first + warpgroup * HALF,
                                pl.ds(tile.n + column, COLUMNS), tile.rows, plan.grain)

        products.in_turns(
            decode, load, lambda tile, done: products.summed(multiply, ring, tile, done, plan.n),
            lambda tile, result: products.write_tile(tile, result, place, out_smem),
            ring=ring, cores=plan.cores, total=count_gmem[0] * n_tiles)

    b_stage = (plan.n, TILE_K) if transposed else (TILE_K, plan.n)
    kernel = _launch(body, plan, jax.ShapeDtypeStruct((R, N), jnp.bfloat16), (TILE_M, TILE_K),
                     b_stage)
    return kernel(items, count, *(a for pair in zip(xs, ws, strict=True) for a in pair))


def weight_gradient(x_RxD, dy_RxF, layout, dtype):
    """The sum over each expert's rows of x^T dy: [E, D, F] in dtype."""
    D, F, E = x_RxD.shape[1], dy_RxF.shape[1], layout.sizes.shape[0]
    plan = tiles.choose(layout, F, jnp.dtype(dtype).itemsize, product="weights", contracted=D)
    groups = tiles.group_items(layout)
    m_tiles, n_tiles = -(-D // TILE_M), -(-F // plan.n)

    def body(groups_gmem, x_gmem, dy_gmem, dw_gmem, *, a_smem, b_smem, out_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * HALF, HALF)
        ring = hopper.Ring(full, empty, plan.stages)

        def decode(number):
            item = lax.div(number, hopper.i32(m_tiles * n_tiles))
            within = number - item * (m_tiles * n_tiles)
            m = lax.div(within, hopper.i32(n_tiles))
            first = pl.multiple_of(groups_gmem[item, 1], plan.grain)
            return products.Tile(
                expert=groups_gmem[item, 0], first=first, steps=groups_gmem[item, 2],
                last=groups_gmem[item, 3], writes=True, m=pl.multiple_of(m * TILE_M, TILE_M),
                n=pl.multiple_of((within - m * n_tiles) * plan.n, plan.n))

        def load(tile, k, slot):
            rows = pl.ds(tile.first + k * TILE_K, TILE_K)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, pl.ds(tile.m, TILE_M)], a_smem.at[slot],
                                    full.at[slot])
            plgpu.copy_gmem_to_smem(dy_gmem.at[rows, pl.ds(tile.n, plan.n)], b_smem.at[slot],
                                    full.at[slot])

        def clear(tile, k, slot):
            # The next group's rows in the last chunk; each warpgroup clears what it multiplies.
            @pl.when((k == tile.steps - 1) & (tile.last < TILE_K))
            def _():
                piece = a_smem.at[slot, :, mine]
                row = plgpu.broadcasted_iota(jnp.int32, (TILE_K, HALF), 0,
                                             layout=plgpu.Layout.WGMMA)
                values = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                piece[...] = jnp.where(row < tile.last, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def multiply(tile, k, slot, acc):
            if plan.grain < TILE_K:
                clear(tile, k, slot)
            plgpu.wgmma(acc, a_smem.at[slot, :, mine].transpose((1, 0)), b_smem.at[slot])

        def place(tile, column, smem):
            rows = pl.ds(tile.m + warpgroup * HALF, HALF)
            columns = pl.ds(tile.n + column, COLUMNS)
            plgpu.copy_smem_to_gmem(smem, dw_gmem.at[tile.expert, rows, columns],
                                    commit_group=False)

        products.in_turns(
            decode, load, lambda tile, done: products.summed(multiply, ring, tile, done, plan.n),
            lambda tile, result: products.write_tile(tile, result, place, out_smem),
            ring=ring, cores=plan.cores, total=hopper.i32(E * m_tiles * n_tiles))

    kernel = _launch(body, plan, jax.ShapeDtypeStruct((E, D, F), dtype), (TILE_K, TILE_M),
                     (TILE_K, plan.n))
    return kernel(groups, x_RxD, dy_RxF)


def _launch(body, plan: Tiles, out, a_stage, b_stage):
    stage = {"a_smem": (a_stage, jnp.bfloat16), "b_smem": (b_stage, jnp.bfloat16)}
    return products.launch(body, out, stages=plan.stages, stage=stage, cores=plan.cores,
                           out_smem=products.result_memory(out.dtype, plan.out_slots))


# Each row of expert e times w[e]; rows of no group become finite.
grouped_matmul = differentiable(
    lambda x, w, layout: rows_times([x], [w], layout, transposed=False),
    lambda dy, w, layout: rows_times([dy], [w], layout, transposed=True), weight_gradient)
