"""scaled_matmul on a TPU's matrix units, dense and grouped, forward and both gradients.

grouped_matmul's kernels (its mosaic_tpu.py) on E4M3 numbers: every 128 of the contracted dim are
multiplied by themselves, scaled and added to a float32 sum in fast memory. What the compilers make
of products of E4M3 (libtpu 0.0.50.1, of 256 x 128 by 128 x 256) is the matrix unit's format `e4m3b`
for a TPU7x, which has 8-bit floating-point units, and `e4m3b_to_bf16` for a v5p and a v6e, which
turn numbers to bfloat16 on their way into the unit: exact as well, and 1 byte is read for each, but
at bfloat16's speed.

Rows and weights are rounded by a kernel too, which moves 3 bytes for a number of bfloat16. XLA
compiles a relayout in float32 to take the largest of 128 lanes and an array of all scales 128 times
over, 29 bytes for a number of a v5p's rows. Columns it rounds itself, in two passes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import tpu
from kernels_pallas.grouped_matmul.layout import contiguous
from kernels_pallas.grouped_matmul.mosaic_tpu import rows_times, weight_gradient
from kernels_pallas.scaled_matmul import derivative
from kernels_pallas.scaled_matmul.tiles import (
    E4M3,
    ROW,
    TILE,
    rounded,
    scale_of,
    whole,
)

_ROWS, _COLUMNS = 512, 2048  # rounded at once: 6 MiB of bfloat16, results and what is in flight


def _round(shape, power_of_two, x, q, scale):
    """Round a block, 128 of its columns at a time, and 128 rows where tiles are as high."""
    by_row = shape == ROW
    high = x.shape[0] if by_row else TILE

    def some(i, j, _):
        rows, columns = pl.ds(i * high, high), pl.ds(pl.multiple_of(j * TILE, TILE), TILE)
        x32 = x[rows, columns].astype(jnp.float32)
        # of the bits: their order is that of the numbers, and a nan is above all
        bits = lax.bitcast_convert_type(jnp.abs(x32), jnp.int32).max(1, keepdims=True)
        bits = bits if by_row else jnp.broadcast_to(bits.max(0, keepdims=True), bits.shape)
        found = scale_of(lax.bitcast_convert_type(bits, jnp.float32), power_of_two)
        q[rows, columns] = rounded(x32, found)
        if by_row:
            scale[pl.ds(j, 1), :] = found.T
        else:
            scale[pl.ds(i, 1), columns] = found.T

    for i in range(x.shape[0] // high):
        lax.fori_loop(0, x.shape[1] // TILE, functools.partial(some, i), None)


def _quantize(x, shape, power_of_two):
    """What tiles.quantize returns for rows [R, N] and blocks [E, M, N], N in whole tiles of 128."""
    by_row = shape == ROW
    *batch, M, N = x.shape
    m, n = min(_ROWS, whole(M)), min(_COLUMNS, N)
    grid = (*batch, pl.cdiv(M, m), pl.cdiv(N, n))
    block = (*(None for _ in batch), m, n)
    # a block has all sublanes of its scales' array: what tiles it has are a dim of their own
    tall, wide = (n // TILE, whole(M)) if by_row else (m // TILE, N)
    scale = (*batch, grid[-1 if by_row else -2], tall, wide)

    def scale_map(*at):
        *e, i, j = at
        return (j, 0, i) if by_row else (*e, i, 0, j)

    q, scale = tpu.call(
        functools.partial(_round, shape, power_of_two), "scaled_matmul_round",
        [jax.ShapeDtypeStruct(x.shape, E4M3), jax.ShapeDtypeStruct(scale, jnp.float32)],
        ("parallel",) * len(grid), grid=grid,
        in_specs=[pl.BlockSpec(block, lambda *at: at)],
        out_specs=[pl.BlockSpec(block, lambda *at: at),
                   pl.BlockSpec((*block[:-2], None, tall, m if by_row else n), scale_map)],
    )(x)
    scale = scale.reshape(*batch, -1, wide)
    if by_row:
        return q, scale[:N // TILE, :M].T
    return q, scale[..., :M // TILE, ::TILE]


def _scale(acc, a, b, contract, by_row, by_column, low=0, high=None):
    """Add a times b to the sums, from low to high of the contracted dim: whole tiles of 128."""
    def tile(ref, dim, i):
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        return ref[:, at] if dim else ref[at, :]

    def add(i, _):
        part = tpu.dot(tile(a, contract[0], i), tile(b, contract[1], i), contract)
        one = pl.ds(i, 1)
        # a row and weights of very different sizes: their scales first, which meet halfway
        acc[...] += part * (by_row[one, :].T * by_column[one, :])

    high = by_row.shape[0] * TILE if high is None else high
    lax.fori_loop(lax.div(low, TILE), lax.div(high, TILE), add, None)


def _rows_times(product, a_RxK, a_scale, b, b_scale, layout, dtype):
    """Rows times their expert's matrix or its transpose, [R, N] in dtype."""
    if product == "scaled_transposed":
        b_scale = jnp.swapaxes(b_scale, 1, 2)
    by_column = jnp.repeat(b_scale, TILE, axis=2)  # [E, K / 128, N]
    by_row = jnp.pad(a_scale, ((0, 0), (0, -a_scale.shape[1] % TILE)))
    return rows_times(product, [a_RxK], [b], layout, dtype=dtype, scale=_scale,
                      scales=(by_row, by_column))


def _contracted(a_PxD, a_scale, b_PxF, b_scale, groups, dtype):
    """Each expert's a^T b over its tiles of 128 rows, [E, D, F] in dtype."""
    _, first, tiles = groups[jnp.argsort(groups[:, 0])].T
    layout = contiguous(tiles * TILE, first * TILE, a_PxD.shape[0], TILE)
    return weight_gradient(a_PxD, b_PxF, layout, dtype, product="scaled_weights", scale=_scale,
                           scales=(a_scale, b_scale))


scaled_matmul = functools.partial(derivative.scaled_matmul, kernels=derivative.Kernels(
    functools.partial(_rows_times, "scaled_transposed"), _contracted,
    functools.partial(_rows_times, "scaled"), _quantize, copies=True))
