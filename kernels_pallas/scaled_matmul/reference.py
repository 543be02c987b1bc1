"""scaled_matmul written out: numbers are rounded to E4M3 and back, then contracted at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.layout import row_expert
from kernels_pallas.scaled_matmul.tiles import BLOCK, COLUMN, ROW, dequantize, quantize


def _rounded(x, shape, power_of_two):
    wide = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    return dequantize(*quantize(x, shape, power_of_two), shape, wide)


def _member(layout, dtype):
    """[R, E]: which expert has a row, none where none does."""
    expert, used = row_expert(layout)
    own = jnp.arange(layout.sizes.shape[0], dtype=expert.dtype)
    return ((expert[:, None] == own[None, :]) & used[:, None]).astype(dtype)


def _rows_of(x_RxD, layout, expert):
    """An expert's rows from its start on, zeros beyond them, [R, D]."""
    at = jnp.arange(layout.rows)
    rows = x_RxD[jnp.minimum(layout.starts[expert] + at, layout.rows - 1)]
    return jnp.where((at < layout.sizes[expert])[:, None], rows, jnp.zeros_like(rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, layout, power_of_two):
    x8, w8 = (_rounded(a, t, power_of_two) for a, t in ((x, ROW), (w, BLOCK)))
    if layout is None:
        return (x8 @ w8).astype(x.dtype)
    every = jnp.einsum("rd,edf->ref", x8, w8)
    return jnp.einsum("ref,re->rf", every, _member(layout, every.dtype)).astype(x.dtype)


def _backward(power_of_two, kept, dy):
    x, w, layout = kept
    dx = _product(dy, jnp.swapaxes(w, -1, -2), layout, power_of_two).astype(x.dtype)
    if layout is None:
        x8, dy8 = (_rounded(a, COLUMN, power_of_two) for a in (x, dy))
        return dx, (x8.T @ dy8).astype(w.dtype), None
    dw = []
    for e in range(w.shape[0]):
        x8, dy8 = (_rounded(_rows_of(a, layout, e), COLUMN, power_of_two) for a in (x, dy))
        dw.append(x8.T @ dy8)
    return dx, jnp.stack(dw).astype(w.dtype), None


_product.defvjp(lambda x, w, layout, p: (_product(x, w, layout, p), (x, w, layout)), _backward)


def scaled_matmul(x, w, layout=None, *, power_of_two=False):
    """Round, multiply, and do likewise for the gradients."""
    return _product(x.reshape(-1, x.shape[-1]), w, layout, power_of_two).reshape(
        *x.shape[:-1], w.shape[-1])
