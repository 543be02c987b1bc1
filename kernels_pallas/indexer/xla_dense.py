"""The divergence over all visible keys, chunk by chunk: for any platform, and around kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.indexer import xla
from kernels_pallas.rounding import narrow


def _mass(plan, first, main_q, main_k, lse):
    """Sum over heads of attention's weights, [B, C, keys]."""
    del first
    B, C, H, D = main_q.shape
    K, dtype = main_k.shape[1], lse.dtype
    q = main_q.reshape(B, C, K, H // K, D).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    raw = jnp.einsum("bkrd,bksd->bkrs", q, main_k, preferred_element_type=dtype)
    raw = raw.reshape(B, K, H // K, C, -1) * np.asarray(plan.main_scale, dtype)
    lse = lse.reshape(B, C, K, H // K).transpose(0, 2, 3, 1)
    heads = np.ndindex(K, H // K)
    return xla.added(jnp.exp(raw[:, i, g] - lse[:, i, g, :, None]) for i, g in heads)


def _width(q, main_q):
    return max(q.shape[2], main_q.shape[2])


class Parts(NamedTuple):
    """What a chip does of the divergence over all keys, a chunk of queries at a time.

    `scores(plan, marks, first, q, k, w, segments)` returns scores [B, C, keys] and what `gradients`
    is to get of them; `mass(plan, first, q, k, lse)` attention's weights summed over heads, k
    [B, K, keys, Dk], anything for what is not seen; `gradients(plan, q, k, w, kept, d_score)` those
    of q, k as [B, D, keys], and w in the sums' dtype; `held` numbers are held at once, for
    `width(q, main_q)` of every query and key.
    """

    scores: Any
    mass: Any
    gradients: Any
    held: int
    width: Any


def _scores(plan, marks, first, q, k, w, segments):
    del marks, first, segments
    raw = xla.products(q, k, xla.wide(q.dtype))
    return xla.scored(plan, raw, w), raw


def _gradients(plan, q, k, w, raw, d_score):
    (B, C, J, D), dtype = q.shape, raw.dtype
    dw = jnp.einsum("bcjs,bcs->bcj", jnp.maximum(raw, 0), d_score)
    d_raw = jnp.where(raw > 0, d_score[:, :, None] * w.astype(dtype)[..., None], 0)
    d_raw = lax.optimization_barrier(narrow(d_raw, k.dtype)).reshape(B, C * J, -1)
    dq = jnp.einsum("brs,bsd->brd", d_raw, k, preferred_element_type=dtype)
    q_T = jnp.swapaxes(q.reshape(B, C * J, D), 1, 2)
    return dq.reshape(q.shape), jnp.einsum("bdr,brs->bds", q_T, d_raw,
                                           preferred_element_type=dtype), dw


XLA = Parts(_scores, _mass, _gradients, xla.SCORES, _width)


def _target(parts, plan, x, main_k, first, keys, seen):
    """(p [B, C, keys], whether there is any [B, C, 1]): attention's mass over its total."""
    main_q, main_lse = x
    mass = jnp.where(seen, parts.mass(plan, first, main_q, main_k[:, :, :keys], main_lse), 0)
    total = mass.sum(-1, keepdims=True)
    some = total > 0
    return mass / jnp.where(some, total, 1), some


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(parts, plan, q, k, w, main_q, main_k, main_lse, marks):
    return _dense_forward(parts, plan, q, k, w, main_q, main_k, main_lse, marks)[0]


def _dense_forward(parts, plan, q, k, w, main_q, main_k, main_lse, marks):
    def chunk(carry, x, first, keys):
        q, w, segments, *main = x
        seen = xla.seen_by(plan, marks, first, q.shape[1], keys, segments)
        at = xla.stands(marks, first)
        scores, _ = parts.scores(plan, marks, at, q, k[:, :keys], w, segments)
        scores = jnp.where(seen, scores, xla.NOTHING)
        lse = jax.nn.logsumexp(scores, axis=-1)
        p, some = _target(parts, plan, main, main_k, at, keys, seen)
        terms = p * (jnp.log(jnp.where(p > 0, p, 1)) - (scores - lse[..., None]))
        loss = jnp.where(some[..., 0], jnp.where(p > 0, terms, 0).sum(-1), 0)
        return carry, (loss, lse)

    xs = (q, w, xla.own_segments(marks, q), main_q, main_lse)
    _, (loss, lse) = xla.sweep(plan, k.shape[1], parts.width(q, main_q), xs, chunk, None, marks,
                            parts.held)
    return loss, (q, k, w, main_q, main_k, main_lse, marks, lse)


def _dense_backward(parts, plan, kept, cotangent):
    kept, cotangent = lax.optimization_barrier((kept, cotangent))
    q, k, w, main_q, main_k, main_lse, marks, lse = kept
    dtype = main_lse.dtype

    def chunk(dk, x, first, keys):
        q, w, segments, lse, g, *main = x
        seen = xla.seen_by(plan, marks, first, q.shape[1], keys, segments)
        at = xla.stands(marks, first)
        scores, made = parts.scores(plan, marks, at, q, k[:, :keys], w, segments)
        scores = jnp.where(seen, scores, xla.NOTHING)
        p, some = _target(parts, plan, main, main_k, at, keys, seen)
        share = jnp.where(seen & some, jnp.exp(scores - lse[..., None]), 0)
        d_score = (share - p) * (g * plan.scale)[..., None]
        dq, part, dw = parts.gradients(plan, q, k[:, :keys], w, made, d_score)
        dk = lax.dynamic_update_slice(dk, dk[:, :, :keys] + part, (0, 0, 0))
        return dk, (narrow(dq, q.dtype), dw.astype(w.dtype))

    xs = (q, w, xla.own_segments(marks, q), lse, cotangent.astype(dtype), main_q, main_lse)
    B, S, D = k.shape
    dk = jnp.zeros((B, D, S), dtype)
    dk, (dq, dw) = xla.sweep(plan, S, parts.width(q, main_q), xs, chunk, dk, marks, parts.held)
    return dq, narrow(jnp.swapaxes(dk, 1, 2), k.dtype), dw, None, None, None, None


_dense.defvjp(_dense_forward, _dense_backward)


def comparing(parts):
    """Return index_kl_dense of a chip that does these parts of it."""
    def index_kl_dense(q_BxLxJxD, k_BxSxD, w_BxLxJ, main_q_BxLxHxDk, main_k_BxSxKxDk,
                       main_lse_BxLxH, *, main_scale, segments_q=None, segments_k=None,
                       ends_BxS=None, stride=1, span=1, scale=1.0, first=0):
        """Compare chunk by chunk."""
        q, main = q_BxLxJxD, lax.stop_gradient((main_q_BxLxHxDk, main_k_BxSxKxDk, main_lse_BxLxH))
        dtype = xla.wide(q.dtype)
        if 0 in (*q.shape[:2], k_BxSxD.shape[1]):
            return jnp.zeros(q.shape[:2], dtype)
        plan = xla.Plan(float(scale), float(main_scale), stride, span)
        main_q, main_k, main_lse = main
        # A row that sees nothing has a mass of exp(score - 1e30) = 0.
        main_lse = jnp.where(main_lse < xla.EMPTY, -xla.NOTHING, main_lse.astype(dtype))
        return _dense(parts, plan, q, k_BxSxD, w_BxLxJ, main_q, jnp.swapaxes(main_k, 1, 2),
                      main_lse, xla.marks_of(segments_q, segments_k, ends_BxS, first))

    return index_kl_dense


index_kl_dense = comparing(XLA)
