"""Cross-entropy written out: all logits at once, in the dtype of its input."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(x_TxD, head, targets_T, weights_T, *, z_loss=0.0, softcap=None, chunk=None,
                  head_layout="DV"):
    """Sum the weighted losses; the chunk means nothing here."""
    del chunk
    wide = jnp.float64 if x_TxD.dtype == jnp.float64 else jnp.float32
    head_DxV = (head if head_layout == "DV" else head.T).astype(x_TxD.dtype)
    logits_TxV = (x_TxD @ head_DxV).astype(wide)
    if softcap is not None:
        logits_TxV = jnp.tanh(logits_TxV / softcap) * softcap
    lse_T = jax.nn.logsumexp(logits_TxV, axis=-1)
    chosen_T = jnp.take_along_axis(logits_TxV, targets_T[:, None], axis=1)[:, 0]
    nll_T = lse_T - chosen_T
    weights_T = jax.lax.stop_gradient(weights_T).astype(wide)
    loss = jnp.sum(weights_T * (nll_T + z_loss * lse_T**2))
    return loss, jax.lax.stop_gradient(nll_T)
