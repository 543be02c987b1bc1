"""grouped_matmul and its gradients, of a chip's two kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def differentiable(times: Callable[..., Any], transposed: Callable[..., Any],
                   weight_gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Return grouped_matmul(x, w, layout), which multiplies in x's dtype.

    `times` and `transposed` of rows, matrices and layout are the product with w and its transpose;
    `weight_gradient(x, dy, layout, dtype)` sums x^T dy over each expert's rows.
    """
    @jax.custom_vjp
    def grouped_matmul(x, w, layout):
        return times(x, w.astype(x.dtype), layout)

    def forward(x, w, layout):
        return grouped_matmul(x, w, layout), (x, w, layout)

    def backward(residuals, dy):
        x, w, layout = residuals
        dy = dy.astype(x.dtype)
        dx = transposed(dy, w.astype(x.dtype), layout)
        return dx, weight_gradient(x, dy, layout, w.dtype), None

    grouped_matmul.defvjp(forward, backward)
    return grouped_matmul
