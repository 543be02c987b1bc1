"""Attention written out: one dense softmax over a dense mask, in the dtype of its input."""

from __future__ import annotations

import jax.numpy as jnp


def visible(L, S, *, segments_q=None, segments_k=None, causal=True, window=None):
    """Return the mask [B or 1, L, S] of the keys that each query sees."""
    position_L = jnp.arange(L) + (S - L)  # the last query stands at the last key
    ahead_LxS = position_L[:, None] - jnp.arange(S)[None, :]
    mask_LxS = jnp.ones((L, S), bool)
    if causal:
        mask_LxS &= ahead_LxS >= 0
    if window is not None:
        mask_LxS &= ahead_LxS < window
    if segments_q is None:
        return mask_LxS[None]
    same_BxLxS = segments_q[:, :, None] == segments_k[:, None, :]
    return mask_LxS[None] & same_BxLxS & (segments_q != 0)[:, :, None]


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
          causal=True, window=None, softcap=None, sinks_H=None, block_q=None, block_k=None):
    """Attend densely; the block sizes mean nothing here."""
    del block_q, block_k
    (L, H), (S, K) = q_BxLxHxDk.shape[1:3], k_BxSxKxDk.shape[1:3]
    k_BxSxHxDk = jnp.repeat(k_BxSxKxDk, H // K, axis=2)
    v_BxSxHxDv = jnp.repeat(v_BxSxKxDv, H // K, axis=2)
    scores_BxHxLxS = jnp.einsum("blhd,bshd->bhls", q_BxLxHxDk, k_BxSxHxDk) * scale
    if softcap is not None:
        scores_BxHxLxS = jnp.tanh(scores_BxHxLxS / softcap) * softcap
    mask_BxLxS = visible(L, S, segments_q=segments_q, segments_k=segments_k, causal=causal,
                         window=window)
    mask_BxHxLxS = jnp.broadcast_to(mask_BxLxS[:, None], scores_BxHxLxS.shape)
    scores_BxHxLxS = jnp.where(mask_BxHxLxS, scores_BxHxLxS, -jnp.inf)
    top_BxHxLx1 = scores_BxHxLxS.max(-1, keepdims=True)
    if sinks_H is not None:
        sinks_1xHx1x1 = sinks_H.astype(scores_BxHxLxS.dtype)[None, :, None, None]
        top_BxHxLx1 = jnp.maximum(top_BxHxLx1, sinks_1xHx1x1)
    top_BxHxLx1 = jnp.where(jnp.isfinite(top_BxHxLx1), top_BxHxLx1, 0)
    weights_BxHxLxS = jnp.where(mask_BxHxLxS, jnp.exp(scores_BxHxLxS - top_BxHxLx1), 0)
    total_BxHxLx1 = weights_BxHxLxS.sum(-1, keepdims=True)
    if sinks_H is not None:
        total_BxHxLx1 += jnp.exp(sinks_1xHx1x1 - top_BxHxLx1)
    total_BxHxLx1 = jnp.where(total_BxHxLx1 > 0, total_BxHxLx1, 1)  # a row that sees nothing is 0
    return jnp.einsum("bhls,bshd->blhd", weights_BxHxLxS / total_BxHxLx1, v_BxSxHxDv)
