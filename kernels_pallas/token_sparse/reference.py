"""Attention to listed tokens written out: one dense softmax over a dense mask."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def visible(chosen_BxLxN, S):
    """Return the mask [B, L, S] of the tokens that a query lists."""
    token_S = jnp.arange(S, dtype=chosen_BxLxN.dtype)
    return (chosen_BxLxN[..., None] == token_S[None, None, None]).any(2)


def token_sparse(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, *, v_dim, scale, unique=False,
                 return_lse=False):
    """Attend densely under the mask of the lists, in the dtype of the input."""
    del unique  # a mask counts once anyway
    mask_BxLx1xS = visible(chosen_BxLxN, kv_BxSxDk.shape[1])[:, :, None]
    scores_BxLxHxS = jnp.einsum("blhd,bsd->blhs", q_BxLxHxDk, kv_BxSxDk) * scale
    scores_BxLxHxS = jnp.where(mask_BxLx1xS, scores_BxLxHxS, -jnp.inf)
    top_BxLxHx1 = scores_BxLxHxS.max(-1, keepdims=True, initial=-jnp.inf)
    top_BxLxHx1 = jnp.where(jnp.isfinite(top_BxLxHx1), top_BxLxHx1, 0)
    weights_BxLxHxS = jnp.where(mask_BxLx1xS, jnp.exp(scores_BxLxHxS - top_BxLxHx1), 0)
    total_BxLxHx1 = weights_BxLxHxS.sum(-1, keepdims=True)
    empty_BxLxHx1 = total_BxLxHx1 == 0
    total_BxLxHx1 = jnp.where(empty_BxLxHx1, 1, total_BxLxHx1)
    weights_BxLxHxS = weights_BxLxHxS / total_BxLxHx1
    o_BxLxHxDv = jnp.einsum("blhs,bsd->blhd", weights_BxLxHxS, kv_BxSxDk[..., :v_dim])
    if not return_lse:
        return o_BxLxHxDv
    dtype = jnp.dtype(jnp.float64 if o_BxLxHxDv.dtype == jnp.float64 else jnp.float32)
    lse_BxLxHx1 = top_BxLxHx1.astype(dtype) + jnp.log(total_BxLxHx1.astype(dtype))
    return o_BxLxHxDv, jnp.where(empty_BxLxHx1, -1e30, lse_BxLxHx1)[..., 0]


def token_mass(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, lse_BxLxH, *, scale):
    """Read the weights of the listed tokens out of all tokens' weights."""
    q, kv, lse = lax.stop_gradient((q_BxLxHxDk, kv_BxSxDk, lse_BxLxH))
    S, dtype = kv.shape[1], lse.dtype
    inside_BxLxN = (chosen_BxLxN >= 0) & (chosen_BxLxN < S)
    if S == 0:
        return jnp.zeros(chosen_BxLxN.shape, dtype)
    scores_BxLxHxS = jnp.einsum("blhd,bsd->blhs", q.astype(dtype), kv.astype(dtype)) * scale
    scores_BxLxHxN = jnp.take_along_axis(
        scores_BxLxHxS, jnp.where(inside_BxLxN, chosen_BxLxN, 0)[:, :, None], axis=3)
    scores_BxLxHxN = jnp.where(inside_BxLxN[:, :, None], scores_BxLxHxN, -jnp.inf)
    return jnp.exp(scores_BxLxHxN - lse[..., None]).sum(2)
