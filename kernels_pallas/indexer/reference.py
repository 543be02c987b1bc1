"""The indexer written out densely."""

import jax
import jax.numpy as jnp

NOTHING = -1e30


def _wide(dtype):
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _visible(L, S, segments_q, segments_k, ends, stride, span, first):
    """[B or 1, L, S]."""
    ends = (jnp.arange(S) * stride + (span - 1))[None] if ends is None else ends
    seen = ends[:, None, :] <= first + jnp.arange(L)[None, :, None]
    if segments_q is not None:
        seen = seen & (segments_q[:, :, None] == segments_k[:, None, :])
        seen = seen & (segments_q != 0)[:, :, None]
    return seen


def _scores(q, k, w, scale):
    q, k, w = (x.astype(_wide(x.dtype)) for x in (q, k, w))
    hits = jax.nn.relu(jnp.einsum("bljd,bsd->bljs", q, k))
    return scale * jnp.einsum("blj,bljs->bls", w, hits)


def _divergence(scores, mass, seen):
    """KL of softmax(scores) from mass / sum(mass) over what is seen."""
    some = seen.any(-1)
    scores = jnp.where(seen, scores, NOTHING)
    log_q = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    mass = jnp.where(seen, jax.lax.stop_gradient(mass), 0)
    total = mass.sum(-1, keepdims=True)
    p = mass / jnp.where(total > 0, total, 1)
    terms = p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q)
    return jnp.where(some, jnp.where(p > 0, terms, 0).sum(-1), 0)


def index_select(q, k, w, *, top, segments_q=None, segments_k=None, ends_BxS=None, stride=1,
                 span=1, scale=1.0, first=0):
    """Sort every row."""
    L, S = q.shape[1], k.shape[1]
    q, k, w = jax.lax.stop_gradient((q, k, w))
    seen = _visible(L, S, segments_q, segments_k, ends_BxS, stride, span, first)
    scores = jnp.where(seen, _scores(q, k, w, scale), -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., :top].astype(jnp.int32)
    order = jnp.where(jnp.take_along_axis(scores, order, axis=-1) > -jnp.inf, order, -1)
    return jnp.pad(order, ((0, 0), (0, 0), (0, top - order.shape[-1])), constant_values=-1)


def index_kl_dense(q, k, w, main_q, main_k, main_lse, *, main_scale, segments_q=None,
                   segments_k=None, ends_BxS=None, stride=1, span=1, scale=1.0, first=0):
    """Hold all scores of all heads."""
    seen = _visible(q.shape[1], k.shape[1], segments_q, segments_k, ends_BxS, stride, span, first)
    main_k = jnp.repeat(main_k, main_q.shape[2] // main_k.shape[2], axis=2)
    dtype = _wide(main_q.dtype)
    main_q, main_k, lse = (x.astype(dtype) for x in (main_q, main_k, main_lse))
    raw = jnp.einsum("blhd,bshd->blhs", main_q, main_k) * main_scale
    mass = jnp.exp(jnp.where(seen[:, :, None], raw - lse[..., None], -jnp.inf)).sum(2)
    return _divergence(_scores(q, k, w, scale), mass, seen)


def index_kl_listed(q, k, w, chosen, mass, *, scale=1.0):
    """Score all and pick the listed."""
    S = k.shape[1]
    seen = (chosen >= 0) & (chosen < S)
    if S == 0:
        return jnp.zeros(q.shape[:2], _wide(q.dtype))
    at = jnp.where(seen, chosen, 0)
    scores = jnp.take_along_axis(_scores(q, k, w, scale), at, axis=2)
    return _divergence(scores, mass.astype(_wide(q.dtype)), seen)
