"""Tokamax's cross-entropy of a linear head behind our signature."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import device, others


def tokamax_supports(x, head, targets, weights, *, z_loss=0.0, softcap=None, **nothing):
    """Return None, or why Tokamax cannot run this call."""
    del head, targets, weights, nothing
    if lacks := others.lacks_tokamax(x=x):
        return lacks
    if device.platform() != "tpu":
        return "Tokamax has no kernel of it for GPUs"
    if z_loss or softcap is not None:
        return f"Tokamax has neither z_loss ({z_loss}) nor softcap ({softcap})"
    return None


def tokamax(x, head, targets, weights, *, z_loss, softcap, chunk, head_layout,
            implementation: str | None = None):
    """Compute by `tokamax.linear_softmax_cross_entropy_loss`."""
    import tokamax as peer

    del z_loss, softcap, chunk
    head = (head if head_layout == "DV" else head.T).astype(x.dtype)
    nll = peer.linear_softmax_cross_entropy_loss(
        x, targets, head, reduction="none", implementation=implementation or others.mosaic())
    nll = nll.astype(jnp.float32)
    return jnp.sum(weights.astype(jnp.float32) * nll), nll
