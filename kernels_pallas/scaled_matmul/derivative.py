"""scaled_matmul and its gradients, of a chip's kernels: what is around them.

Letters beside the house's: K the contracted dim and N the result's columns, in whole tiles of 128;
P counts rows in tiles of 128, by groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.layout import contiguous
from kernels_pallas.scaled_matmul.tiles import BLOCK, COLUMN, ROW, TILE, quantize, row_tiles, whole


class Kernels(NamedTuple):
    """A chip's products, each of 8-bit arrays, their scales and what says whose rows are whose.

    `transposed(a, a_scale, b, b_scale, layout, dtype)` is rows times the transpose of their
    expert's matrix: a [R, K], b [E, N, K] -> [R, N], the scales [K / 128, R] and
    [E, N / 128, K / 128]. `times` is rows times the matrix, b [E, K, N] and its scales likewise.
    `contracted(a, a_scale, b, b_scale, groups, dtype)` is each expert's a^T b over its tiles of 128
    rows: a [P, D], b [P, F] -> [E, D, F], scales [P / 128, D] and [P / 128, F], groups as
    tiles.row_tiles has them.

    Without `times` 8-bit numbers are multiplied along the last dims of both alone: XLA writes
    transposes, and `contracted` gets a [D, P] and b [F, P].
    `quantize` rounds rows and blocks as tiles.quantize does; columns are always rounded by XLA.
    Where XLA `copies` rows into their group's tiles before it rounds, a dense product's are left
    where they lie, which is the same.
    """

    transposed: Callable[..., jax.Array]
    contracted: Callable[..., jax.Array]
    times: Callable[..., jax.Array] | None = None
    quantize: Callable[..., Any] = quantize
    copies: bool = False


def _fill(x, *lengths):
    """Zeros up to these lengths of the last dims."""
    widths = [(0, 0)] * (x.ndim - len(lengths))
    widths += [(0, n - have) for n, have in zip(lengths, x.shape[-len(lengths):], strict=True)]
    return jnp.pad(x, widths) if any(map(any, widths)) else x


def _product(kernels: Kernels, x_RxK, w_ExKxN, layout, power_of_two, *, transposed=False):
    """Rows times their expert's matrix, or the transpose of its [N, K]: [R, N] in x's dtype."""
    K, N = w_ExKxN.shape[:0:-1] if transposed else w_ExKxN.shape[1:]
    a, a_scale = kernels.quantize(_fill(x_RxK, whole(K)), ROW, power_of_two)
    b, b_scale = kernels.quantize(_fill(w_ExKxN, *map(whole, w_ExKxN.shape[1:])), BLOCK,
                                  power_of_two)
    if not transposed and kernels.times is None:
        b, b_scale = (jnp.swapaxes(x, 1, 2) for x in (b, b_scale))
        transposed = True
    multiply: Any = kernels.transposed if transposed else kernels.times
    y = multiply(a, a_scale.T, b, b_scale, layout, x_RxK.dtype)
    return y[:, :N]


def _weight_gradient(kernels: Kernels, x_RxD, dy_RxF, layout, power_of_two, dense, dtype):
    """Each group's x^T dy, by tiles of 128 of its rows: [E, D, F] in dtype."""
    row, mine, groups = row_tiles(layout)

    def columns(a):
        """Return a in 8 bits by the groups' tiles, and the scales of its columns [P / 128, D]."""
        rows = _fill(a, whole(a.shape[1]))
        if not (dense and kernels.copies):
            rows = jnp.where(mine.reshape(-1, 1), rows[row.reshape(-1)], jnp.zeros((), a.dtype))
        q, scale = quantize(rows, COLUMN, power_of_two)
        return q.T if kernels.times is None else q, scale

    dw = kernels.contracted(*columns(x_RxD), *columns(dy_RxF), groups, dtype)
    return dw[:, :x_RxD.shape[1], :dy_RxF.shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _grouped(kernels, x, w, layout, power_of_two, dense):
    del dense
    return _product(kernels, x, w, layout, power_of_two)


def _forward(kernels, x, w, layout, power_of_two, dense):
    del dense
    return _product(kernels, x, w, layout, power_of_two), (x, w, layout)


def _backward(kernels, power_of_two, dense, kept, dy):
    x, w, layout = kept
    dx = _product(kernels, dy, w, layout, power_of_two, transposed=True)
    return dx, _weight_gradient(kernels, x, dy, layout, power_of_two, dense, w.dtype), None


_grouped.defvjp(_forward, _backward)


def scaled_matmul(x: Any, w: Any, layout: Any = None, *, kernels: Kernels,
                  power_of_two: bool = False) -> Any:
    """Round and multiply in 8 bits; a dense product is that of one group of all rows."""
    if layout is not None:
        return _grouped(kernels, x, w, layout, power_of_two, False)
    rows = x.reshape(-1, x.shape[-1])
    R = rows.shape[0]
    # whole tiles: the last rows of a tile that reach beyond an array would be read as they are
    rows = jnp.pad(rows, ((0, -R % TILE), (0, 0)))
    layout = contiguous(jnp.full(1, R, jnp.int32), jnp.zeros(1, jnp.int32), rows.shape[0], TILE)
    y = _grouped(kernels, rows, w[None], layout, power_of_two, True)[:R]
    return y.reshape(*x.shape[:-1], w.shape[-1])
