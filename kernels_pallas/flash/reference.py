"""Attention written out: one dense softmax over a dense mask, in the dtype of its input."""

from __future__ import annotations

import jax.numpy as jnp


def visible(L, S, *, segments_q=None, segments_k=None, causal=True, window=None, ends_BxS=None,
            stride=1, span=1, first=None):
    """Return the mask [B or 1, L, S] of the keys that each query sees."""
    strided = ends_BxS is not None or (stride, span) != (1, 1)
    if first is None:
        first = 0 if strided else S - L  # plain: the last query at the last key
    position_L = jnp.arange(L) + first
    if ends_BxS is None:
        ends_BxS = (jnp.arange(S) * stride + span - 1)[None]
    ends_BxS = ends_BxS.astype(position_L.dtype)
    behind_BxLxS = position_L[None, :, None] - ends_BxS[:, None, :]
    mask_BxLxS = jnp.ones(behind_BxLxS.shape, bool)
    if causal:
        mask_BxLxS &= behind_BxLxS >= 0
    if window is not None:
        mask_BxLxS &= behind_BxLxS < window
    if segments_q is None:
        return mask_BxLxS
    same_BxLxS = segments_q[:, :, None] == segments_k[:, None, :]
    same_BxLxS &= (segments_q != 0)[:, :, None]
    return jnp.broadcast_to(mask_BxLxS, same_BxLxS.shape) & same_BxLxS


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
          causal=True, window=None, softcap=None, sinks_H=None, ends_BxS=None, stride=1, span=1,
          return_lse=False, block_q=None, block_k=None, first=None):
    """Attend densely; the block sizes mean nothing here."""
    del block_q, block_k
    (L, H), (S, K) = q_BxLxHxDk.shape[1:3], k_BxSxKxDk.shape[1:3]
    k_BxSxHxDk = jnp.repeat(k_BxSxKxDk, H // K, axis=2)
    v_BxSxHxDv = jnp.repeat(v_BxSxKxDv, H // K, axis=2)
    scores_BxHxLxS = jnp.einsum("blhd,bshd->bhls", q_BxLxHxDk, k_BxSxHxDk) * scale
    if softcap is not None:
        scores_BxHxLxS = jnp.tanh(scores_BxHxLxS / softcap) * softcap
    mask_BxLxS = visible(L, S, segments_q=segments_q, segments_k=segments_k, causal=causal,
                         window=window, ends_BxS=ends_BxS, stride=stride, span=span, first=first)
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
    empty_BxHxLx1 = total_BxHxLx1 == 0
    total_BxHxLx1 = jnp.where(empty_BxHxLx1, 1, total_BxHxLx1)  # a row that sees nothing is 0
    o = jnp.einsum("bhls,bshd->blhd", weights_BxHxLxS / total_BxHxLx1, v_BxSxHxDv)
    lse_BxHxLx1 = jnp.where(empty_BxHxLx1, -1e30, top_BxHxLx1 + jnp.log(total_BxHxLx1))
    wide = jnp.float64 if lse_BxHxLx1.dtype == jnp.float64 else jnp.float32
    return (o, lse_BxHxLx1[..., 0].swapaxes(1, 2).astype(wide)) if return_lse else o
