"""grouped_matmul on Blackwell's tensor cores: bfloat16, added up in float32 in tensor memory.

Forward and backward; tiles and their order are Hopper's (tiles.py), and how a program goes through
them is in `kernels_pallas/blackwell.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, hopper, products
from kernels_pallas.grouped_matmul import tiles
from kernels_pallas.grouped_matmul.derivative import differentiable
from kernels_pallas.grouped_matmul.tiles import COLUMNS, TILE_K, TILE_M, Tiles

_BF16 = jnp.bfloat16


def rows_times(xs, ws, layout, *, transposed):
    """The sum over x of xs and w of ws of x [R, K] times each expert's w [E, K, N]: [R, N].

    With `transposed` w is [E, N, K]. Their products follow one another in one sum.
    """
    R, K = xs[0].shape
    N = ws[0].shape[1] if transposed else ws[0].shape[2]
    plan = tiles.choose(layout, N, 2, product="transposed" if transposed else "rows",
                        contracted=K)
    items, count = tiles.row_items(layout)
    n_tiles, steps = -(-N // plan.n), K // TILE_K
    across = tiles.across(n_tiles)

    def body(items_gmem, count_gmem, *refs, a_smem, b_smem, out_smem, ring, sums):
        *sources, y_gmem = refs
        pairs = list(zip(sources[::2], sources[1::2], strict=True))

        def decode(number):
            return products.row_tile(number, items_gmem, count_gmem[0], across, n=plan.n,
                                     grain=plan.grain, steps=len(pairs) * steps, before=0)

        def load(tile, k, slot):
            def start(i):
                x_gmem, w_gmem = pairs[i]
                contracted = pl.ds((k - i * steps) * TILE_K, TILE_K)
                plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(tile.first, TILE_M), contracted],
                                        a_smem.at[slot], ring.full.at[slot])
                columns = pl.ds(tile.n, plan.n)
                where = (columns, contracted) if transposed else (contracted, columns)
                plgpu.copy_gmem_to_smem(w_gmem.at[tile.expert, *where], b_smem.at[slot],
                                        ring.full.at[slot])

            if len(pairs) == 1:
                start(0)
                return
            for i in range(len(pairs)):
                pl.when((k >= i * steps) & (k < (i + 1) * steps))(functools.partial(start, i))

        def multiply(tile, k, slot, place):
            b = b_smem.at[slot]
            plgpu.tcgen05_mma(place, a_smem.at[slot], b.transpose((1, 0)) if transposed else b,
                              accumulate=k > 0)

        def finish(tile, sums):
            def place(column, smem):
                products.store_rows(smem, y_gmem, tile.first, pl.ds(tile.n + column, COLUMNS),
                                    tile.rows, plan.grain, whole=TILE_M)

            blackwell.write_tile(plan.n, functools.partial(blackwell.taken, tile, sums), place,
                                 out_smem)

        blackwell.in_turns(decode, load, multiply, finish, ring=ring, sums=sums,
                           cores=plan.cores, total=count_gmem[0] * n_tiles)

    b_stage = (plan.n, TILE_K) if transposed else (TILE_K, plan.n)
    kernel = _launch(body, plan, jax.ShapeDtypeStruct((R, N), _BF16), (TILE_M, TILE_K), b_stage)
    return kernel(items, count, *(a for pair in zip(xs, ws, strict=True) for a in pair))


def weight_gradient(x_RxD, dy_RxF, layout, dtype):
    """The sum over each expert's rows of x^T dy: [E, D, F] in dtype."""
    D, F, E = x_RxD.shape[1], dy_RxF.shape[1], layout.sizes.shape[0]
    plan = tiles.choose(layout, F, jnp.dtype(dtype).itemsize, product="weights", contracted=D)
    groups = tiles.group_items(layout)
    m_tiles, n_tiles = -(-D // TILE_M), -(-F // plan.n)

    def body(groups_gmem, x_gmem, dy_gmem, dw_gmem, *, a_smem, b_smem, out_smem, ring, sums):
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
            for source, first, smem in ((x_gmem, pl.ds(tile.m, TILE_M), a_smem),
                                        (dy_gmem, pl.ds(tile.n, plan.n), b_smem)):
                plgpu.copy_gmem_to_smem(source.at[rows, first], smem.at[slot],
                                        ring.full.at[slot])

        def clear(tile, k, slot):
            # The next group's rows in the last chunk.
            @pl.when((k == tile.steps - 1) & (tile.last < TILE_K))
            def _():
                layout = plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(jnp.int32, (TILE_K, TILE_M), 0, layout=layout)
                values = plgpu.load(a_smem.at[slot], layout=layout)
                a_smem.at[slot][...] = jnp.where(row < tile.last, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def multiply(tile, k, slot, place):
            if plan.grain < TILE_K:
                clear(tile, k, slot)
            plgpu.tcgen05_mma(place, a_smem.at[slot].transpose((1, 0)), b_smem.at[slot],
                              accumulate=k > 0)

        def finish(tile, sums):
            def place(column, smem):
                rows, columns = pl.ds(tile.m, TILE_M), pl.ds(tile.n + column, COLUMNS)
                plgpu.copy_smem_to_gmem(smem, dw_gmem.at[tile.expert, rows, columns],
                                        commit_group=False)

            blackwell.write_tile(plan.n, functools.partial(blackwell.taken, tile, sums), place,
                                 out_smem)

        blackwell.in_turns(decode, load, multiply, finish, ring=ring, sums=sums,
                           cores=plan.cores, total=hopper.i32(E * m_tiles * n_tiles))

    kernel = _launch(body, plan, jax.ShapeDtypeStruct((E, D, F), dtype), (TILE_K, TILE_M),
                     (TILE_K, plan.n))
    return kernel(groups, x_RxD, dy_RxF)


def _launch(body, plan: Tiles, out, a_stage, b_stage):
    stage = {"a_smem": (a_stage, _BF16), "b_smem": (b_stage, _BF16)}
    return blackwell.launch(
        body, out, stages=plan.stages, stage=stage, width=plan.n, cores=plan.cores,
        out_smem=hopper.shared((plan.out_slots, TILE_M, COLUMNS), out.dtype))


# Each row of expert e times w[e]; rows of no group become finite.
grouped_matmul = differentiable(
    lambda x, w, layout: rows_times([x], [w], layout, transposed=False),
    lambda dy, w, layout: rows_times([dy], [w], layout, transposed=True), weight_gradient)
