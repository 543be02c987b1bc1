"""Attention to chosen blocks written out: one dense softmax over a dense mask."""

from __future__ import annotations

import jax.numpy as jnp


def visible(blocks_BxLxGxN, starts_BxM, S, block):
    """Return the mask [B, L, G, S] of the keys that lie in a chosen block."""
    M = starts_BxM.shape[1]
    number_M = jnp.arange(M, dtype=blocks_BxLxGxN.dtype)
    chosen_BxLxGxM = (blocks_BxLxGxN[..., None] == number_M[None, None, None, None]).any(3)
    ahead_BxMxS = jnp.arange(S, dtype=starts_BxM.dtype)[None, None, :] - starts_BxM[:, :, None]
    inside_BxMxS = (ahead_BxMxS >= 0) & (ahead_BxMxS < block)
    return (chosen_BxLxGxM[..., None] & inside_BxMxS[:, None, None]).any(3)


def block_sparse(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, *, block, scale,
                 return_lse=False):
    """Attend densely under the mask of the choices, in the dtype of the input."""
    H, (S, K), G = q_BxLxHxDk.shape[2], k_BxSxKxDk.shape[1:3], blocks_BxLxGxN.shape[2]
    k_BxSxHxDk = jnp.repeat(k_BxSxKxDk, H // K, axis=2)
    v_BxSxHxDv = jnp.repeat(v_BxSxKxDv, H // K, axis=2)
    mask_BxLxHxS = jnp.repeat(visible(blocks_BxLxGxN, starts_BxM, S, block), H // G, axis=2)
    scores_BxLxHxS = jnp.einsum("blhd,bshd->blhs", q_BxLxHxDk, k_BxSxHxDk) * scale
    scores_BxLxHxS = jnp.where(mask_BxLxHxS, scores_BxLxHxS, -jnp.inf)
    top_BxLxHx1 = scores_BxLxHxS.max(-1, keepdims=True, initial=-jnp.inf)
    top_BxLxHx1 = jnp.where(jnp.isfinite(top_BxLxHx1), top_BxLxHx1, 0)
    weights_BxLxHxS = jnp.where(mask_BxLxHxS, jnp.exp(scores_BxLxHxS - top_BxLxHx1), 0)
    total_BxLxHx1 = weights_BxLxHxS.sum(-1, keepdims=True)
    empty_BxLxHx1 = total_BxLxHx1 == 0
    total_BxLxHx1 = jnp.where(empty_BxLxHx1, 1, total_BxLxHx1)
    o_BxLxHxDv = jnp.einsum("blhs,bshd->blhd", weights_BxLxHxS / total_BxLxHx1, v_BxSxHxDv)
    if not return_lse:
        return o_BxLxHxDv
    dtype = jnp.dtype(jnp.float64 if o_BxLxHxDv.dtype == jnp.float64 else jnp.float32)
    lse_BxLxHx1 = top_BxLxHx1.astype(dtype) + jnp.log(total_BxLxHx1.astype(dtype))
    return o_BxLxHxDv, jnp.where(empty_BxLxHx1, -1e30, lse_BxLxHx1)[..., 0]
