"""grouped_swiglu on a GPU's tensor cores: both products in one kernel, the activation at its end.

The kernel here is Hopper's, Blackwell's is in mosaic_gpu_blackwell.py. Rows are read once for both,
and the products go to memory only where the backward pass wants them. That multiplies rows'
gradients by both matrices into one accumulator, so that no part of them is rounded or added up in
memory. Tiles and their order are grouped_matmul's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper, products
from kernels_pallas.grouped_matmul import mosaic_gpu as grouped
from kernels_pallas.grouped_matmul import tiles
from kernels_pallas.grouped_matmul.tiles import COLUMNS, TILE_K, TILE_M
from kernels_pallas.grouped_swiglu import gpu_plan, xla
from kernels_pallas.hopper import HALF

_F32, _BF16 = jnp.float32, jnp.bfloat16


def fused(x_RxD, gate_ExDxF, up_ExDxF, layout, *, keep):
    """Return the result [R, F], and with `keep` the products [R, F] with gate and up after it."""
    (R, D), F = x_RxD.shape, gate_ExDxF.shape[2]
    n = gpu_plan.columns(F)
    stages, grain, cores = gpu_plan.stages(n), tiles.grain(layout), device.target().cores
    items, count = tiles.row_items(layout)
    n_tiles = -(-F // n)
    across = tiles.across(n_tiles)

    def body(items_gmem, count_gmem, x_gmem, gate_gmem, up_gmem, *outs_gmem, a_smem, gate_smem,
             up_smem, out_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        ring = hopper.Ring(full, empty, stages)

        def decode(number):
            return products.row_tile(number, items_gmem, count_gmem[0], across, n=n, grain=grain,
                                     steps=D // TILE_K)

        def load(tile, k, slot):
            contracted, columns = pl.ds(k * TILE_K, TILE_K), pl.ds(tile.n, n)
            for source, target in (
                    (x_gmem.at[pl.ds(tile.first, TILE_M), contracted], a_smem),
                    (gate_gmem.at[tile.expert, contracted, columns], gate_smem),
                    (up_gmem.at[tile.expert, contracted, columns], up_smem)):
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        def multiply(tile, k, slot, gate_acc, up_acc):
            a = a_smem.at[slot, pl.ds(warpgroup * HALF, HALF)]
            plgpu.wgmma(gate_acc, a, gate_smem.at[slot])
            plgpu.wgmma(up_acc, a, up_smem.at[slot])

        def write(target, tile, values, column):
            def place(tile, _, smem):
                products.store_rows(smem, target, tile.first + warpgroup * HALF,
                                    pl.ds(tile.n + column, COLUMNS), tile.rows, grain)

            products.write_tile(tile, values, place, out_smem)

        def finish(tile, result):
            for column in range(0, n, COLUMNS):
                gate, up = (x[:, column:column + COLUMNS] for x in result)
                logistic = 1 / (1 + jnp.exp(-gate))
                # the result first: its registers are free before the products are written
                write(outs_gmem[0], tile, gate * logistic * up, column)
                for target, values in zip(outs_gmem[1:], (gate, up), strict=False):
                    write(target, tile, values, column)

        products.in_turns(
            decode, load, lambda tile, done: products.summed(multiply, ring, tile, done, n, n),
            finish, ring=ring, cores=cores, total=count_gmem[0] * n_tiles, registers=(24, 240))

    stage = {"a_smem": ((TILE_M, TILE_K), _BF16), "gate_smem": ((TILE_K, n), _BF16),
             "up_smem": ((TILE_K, n), _BF16)}
    out = [jax.ShapeDtypeStruct((R, F), _BF16)] * (3 if keep else 1)
    kernel = products.launch(body, out, stages=stages, stage=stage, cores=cores, approx_math=True,
                             out_smem=products.result_memory(_BF16))
    return kernel(items, count, x_RxD, gate_ExDxF.astype(_BF16), up_ExDxF.astype(_BF16))


def over(fused, products):
    """Return grouped_swiglu and its gradient of these kernels: this one, and grouped_matmul's."""
    @jax.custom_vjp
    def grouped_swiglu(x, gate, up, layout):
        """Multiply and bend in one kernel; rows of no group become finite."""
        return fused(x, gate, up, layout, keep=False)[0]

    def forward(x, gate, up, layout):
        y, *made = fused(x, gate, up, layout, keep=True)
        return y, (x, gate, up, layout, *made)

    def backward(kept, dy):
        x, gate, up, layout, *made = kept
        d = [a.astype(_BF16) for a in xla.slopes(*map(xla.wide, (*made, dy)))]
        dx = products.rows_times(d, [w.astype(_BF16) for w in (gate, up)], layout, transposed=True)
        weigh = functools.partial(products.weight_gradient, x, layout=layout, dtype=gate.dtype)
        return dx, *map(weigh, d), None

    grouped_swiglu.defvjp(forward, backward)
    return grouped_swiglu


grouped_swiglu = over(fused, grouped)
