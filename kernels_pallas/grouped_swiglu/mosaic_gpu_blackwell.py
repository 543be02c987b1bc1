"""grouped_swiglu on Blackwell's tensor cores: both products in a kernel, the activation at its end.

As on Hopper (mosaic_gpu.py), but that both sums of a tile lie side by side in tensor memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, device, hopper, products
from kernels_pallas.grouped_matmul import mosaic_gpu_blackwell as grouped
from kernels_pallas.grouped_matmul import tiles
from kernels_pallas.grouped_matmul.tiles import COLUMNS, TILE_K, TILE_M
from kernels_pallas.grouped_swiglu import gpu_plan, mosaic_gpu

_BF16 = jnp.bfloat16


def fused(x_RxD, gate_ExDxF, up_ExDxF, layout, *, keep):
    """Return the result [R, F], and with `keep` the products [R, F] with gate and up after it."""
    (R, D), F = x_RxD.shape, gate_ExDxF.shape[2]
    n = gpu_plan.columns(F)
    stages, grain, cores = gpu_plan.stages(n), tiles.grain(layout), device.target().cores
    items, count = tiles.row_items(layout)
    n_tiles = -(-F // n)
    across = tiles.across(n_tiles)

    def body(items_gmem, count_gmem, x_gmem, gate_gmem, up_gmem, *outs_gmem, a_smem, gate_smem,
             up_smem, out_smem, ring, sums):
        def decode(number):
            return products.row_tile(number, items_gmem, count_gmem[0], across, n=n, grain=grain,
                                     steps=D // TILE_K, before=0)

        def load(tile, k, slot):
            contracted, columns = pl.ds(k * TILE_K, TILE_K), pl.ds(tile.n, n)
            for source, target in (
                    (x_gmem.at[pl.ds(tile.first, TILE_M), contracted], a_smem),
                    (gate_gmem.at[tile.expert, contracted, columns], gate_smem),
                    (up_gmem.at[tile.expert, contracted, columns], up_smem)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ring.full.at[slot])

        def multiply(tile, k, slot, place):
            for i, b_smem in enumerate((gate_smem, up_smem)):
                plgpu.tcgen05_mma(place.at[:, pl.ds(i * n, n)], a_smem.at[slot], b_smem.at[slot],
                                  accumulate=k > 0)

        def finish(tile, place):
            def write(target, take):
                def rows(column, smem):
                    products.store_rows(smem, target, tile.first, pl.ds(tile.n + column, COLUMNS),
                                        tile.rows, grain, whole=TILE_M)

                blackwell.write_tile(n, take, rows, out_smem)

            def product(i, column):
                return blackwell.taken(tile, place, i * n + column)

            def bent(column):
                gate, up = product(0, column), product(1, column)
                return gate / (1 + jnp.exp(-gate)) * up

            # each is taken anew: registers do not hold what is written after the result
            takes = (bent, functools.partial(product, 0), functools.partial(product, 1))
            for target, take in zip(outs_gmem, takes, strict=False):
                write(target, take)

        blackwell.in_turns(decode, load, multiply, finish, ring=ring, sums=sums, cores=cores,
                           total=count_gmem[0] * n_tiles)

    stage = {"a_smem": ((TILE_M, TILE_K), _BF16), "gate_smem": ((TILE_K, n), _BF16),
             "up_smem": ((TILE_K, n), _BF16)}
    out = [jax.ShapeDtypeStruct((R, F), _BF16)] * (3 if keep else 1)
    kernel = blackwell.launch(
        body, out, stages=stages, stage=stage, width=2 * n, cores=cores, approx_math=True,
        out_smem=hopper.shared((1, TILE_M, COLUMNS), _BF16))
    return kernel(items, count, x_RxD, gate_ExDxF.astype(_BF16), up_ExDxF.astype(_BF16))


grouped_swiglu = mosaic_gpu.over(fused, grouped)
