"""Gradient accumulation that equals the large batch, whatever the weights in each part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(batch: Any, count: int) -> Any:
    """The rows of a batch dealt into `count` micro-batches.

    Shapes: leaves [B, ...] to [count, B / count, ...]. Micro-batch i takes rows i, i + count, ...,
    so rows split over devices in blocks stay where they are.
    Errors: ValueError naming both numbers when `count` does not divide the rows.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if count < 1 or rows % count:
        raise ValueError(f"accumulate: {count} micro-batches do not divide {rows} rows")

    def deal(x):
        return jnp.swapaxes(x.reshape(rows // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(deal, batch)


def accumulate(sums: Callable[[Any, Any], Any], params: Any, microbatches: Any) -> Any:
    """The total of `sums(params, microbatch)` over the leading dim of `microbatches`.

    `sums` returns any pytree of sums over tokens (gradients of the summed loss, the summed loss,
    summed weights, expert loads) and nothing is averaged before the caller divides once.
    """
    count = jax.tree.leaves(microbatches)[0].shape[0]
    if count == 1:
        return sums(params, jax.tree.map(lambda x: x[0], microbatches))
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, params, first))

    def body(total, microbatch):
        return jax.tree.map(jnp.add, total, sums(params, microbatch)), None

    return jax.lax.scan(body, zeros, microbatches)[0]


def divide(sums: Any, weight: jax.Array) -> Any:
    """Every sum over the total weight; zeros when no target counted."""
    inverse = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
    return jax.tree.map(lambda s: s * inverse.astype(s.dtype), sums)
