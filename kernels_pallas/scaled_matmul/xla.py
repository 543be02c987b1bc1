"""scaled_matmul for any platform: a loop over the tiles of the contracted dim.

E4M3 numbers are products of bfloat16 without rounding, so a tile's product runs in bfloat16 where a
platform has no 8-bit units; 128 of them are summed, scaled and added up in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul import xla as grouped
from kernels_pallas.grouped_matmul.layout import row_expert
from kernels_pallas.scaled_matmul.tiles import BLOCK, COLUMN, ROW, TILE, quantize


def _whole(x, dim):
    """Zeros up to a whole number of tiles along a dim."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % TILE)
    return jnp.pad(x, widths)


def _rows_times(x_RxK, w, layout, power_of_two):
    """Rows times a matrix, or each times its expert's: [R, N] in float32."""
    (x8, x_scale), (w8, w_scale) = (quantize(a, t, power_of_two)
                                    for a, t in ((x_RxK, ROW), (w, BLOCK)))
    x8, w8 = (_whole(a, dim).astype(jnp.bfloat16) for a, dim in ((x8, 1), (w8, -2)))
    R, N = x_RxK.shape[0], w.shape[-1]
    expert = None if layout is None else row_expert(layout)[0]

    def step(c, total):
        rows = lax.dynamic_slice_in_dim(x8, c * TILE, TILE, 1)
        matrix = lax.dynamic_slice_in_dim(w8, c * TILE, TILE, w.ndim - 2)
        of_w = lax.dynamic_index_in_dim(w_scale, c, w.ndim - 2, keepdims=False)
        if layout is None:
            part = jnp.matmul(rows, matrix, preferred_element_type=jnp.float32)
            of_w = of_w[None, :]
        else:
            part = grouped.rows_times(rows, matrix, layout, dtype=jnp.float32)
            of_w = of_w[expert]
        of_x = lax.dynamic_slice_in_dim(x_scale, c, 1, 1)
        return total + part * of_x * jnp.repeat(of_w, TILE, axis=1)[:, :N]

    return lax.fori_loop(0, x8.shape[1] // TILE, step, jnp.zeros((R, N), jnp.float32))


def _weight_gradient(x_RxD, dy_RxF, starts, sizes, power_of_two):
    """Each group's x^T dy, by tiles of 128 of its rows: [E, D, F] in float32."""
    per_group = (sizes + (TILE - 1)) // TILE
    ends = jnp.cumsum(per_group, dtype=jnp.int32)
    # a tile that begins in the last rows reads zeros beyond them
    x, dy = (jnp.pad(a, ((0, TILE), (0, 0))) for a in (x_RxD, dy_RxF))
    offset = jnp.arange(TILE, dtype=jnp.int32)

    def step(i, dw):
        e = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        first = (i - (ends - per_group)[e]).astype(jnp.int32) * TILE
        mine = (first + offset < sizes[e])[:, None]

        def tile(a):
            rows = lax.dynamic_slice_in_dim(a, starts[e] + first, TILE)
            q, scale = quantize(jnp.where(mine, rows, jnp.zeros_like(rows)), COLUMN, power_of_two)
            return q.astype(jnp.bfloat16), scale[0]

        (x8, x_scale), (dy8, dy_scale) = tile(x), tile(dy)
        part = jnp.einsum("rd,rf->df", x8, dy8, preferred_element_type=jnp.float32)
        return dw.at[e].add(part * x_scale[:, None] * dy_scale[None, :])

    shape = (sizes.shape[0], x_RxD.shape[1], dy_RxF.shape[1])
    return lax.fori_loop(0, ends[-1], step, jnp.zeros(shape, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, layout, power_of_two):
    return _rows_times(x, w, layout, power_of_two).astype(x.dtype)


def _forward(x, w, layout, power_of_two):
    return _product(x, w, layout, power_of_two), (x, w, layout)


def _backward(power_of_two, kept, dy):
    x, w, layout = kept
    dx = _rows_times(dy, jnp.swapaxes(w, -1, -2), layout, power_of_two).astype(x.dtype)
    if layout is None:
        starts, sizes = jnp.zeros(1, jnp.int32), jnp.full(1, x.shape[0], jnp.int32)
    else:
        starts, sizes = layout.starts, layout.sizes.astype(jnp.int32)
    dw = _weight_gradient(x, dy, starts, sizes, power_of_two)
    return dx, (dw[0] if layout is None else dw).astype(w.dtype), None


_product.defvjp(_forward, _backward)


def scaled_matmul(x, w, layout=None, *, power_of_two=False):
    """Multiply tile by tile."""
    return _product(x.reshape(-1, x.shape[-1]), w, layout, power_of_two).reshape(
        *x.shape[:-1], w.shape[-1])
