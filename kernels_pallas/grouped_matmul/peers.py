"""Tokamax's ragged product behind our signature."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import others


def tokamax_supports(x, w, layout) -> str | None:
    """Return None, or why Tokamax cannot run this call."""
    del w
    if lacks := others.lacks_tokamax(x=x):
        return lacks
    if layout.split:
        return "Tokamax's groups lie in one place, the rows of an expert may lie in two"
    return None


def tokamax(x, w, layout, *, implementation: str | None = None):
    """Multiply by `tokamax.ragged_dot`, whose groups lie end to end: ours with the rows between."""
    import tokamax as peer

    ends = jnp.concatenate([layout.starts[1:], jnp.full_like(layout.starts[:1], layout.rows)])
    return peer.ragged_dot(x, w.astype(x.dtype), ends - layout.starts,
                           implementation=implementation or others.mosaic())
