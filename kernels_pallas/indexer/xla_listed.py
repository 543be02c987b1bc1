"""The divergence over listed keys for any platform: gathered and compared chunk by chunk."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import rows
from kernels_pallas.indexer import xla
from kernels_pallas.rounding import narrow

# Keys gathered at once.
GATHERED = 1 << 14


def _listed_scores(plan, table, q, w, at, dtype):
    """(keys [C, N, D], raw products [C, J, N], scores [C, N], whether listed [C, N])."""
    own = lax.optimization_barrier(rows.read(table, at))
    raw = jnp.einsum("cjd,cnd->cjn", q, own, preferred_element_type=dtype)
    scores = xla.scored(plan, raw[None], w[None])[0]
    listed = at < table.shape[0] - 1
    return own, raw, jnp.where(listed, scores, xla.NOTHING), listed


def target(mass, listed, dtype):
    """Return (p, whether there is any): the mass of what is listed over its total."""
    mass = jnp.where(listed, mass.astype(dtype), 0)
    total = mass.sum(-1, keepdims=True)
    some = total > 0
    return mass / jnp.where(some, total, 1), some


def divergence(scores, mass, listed):
    """Return the divergence of the softmax of scores [..., N], NOTHING where nothing is listed."""
    p, some = target(mass, listed, scores.dtype)
    log_q = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    terms = jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0)
    return jnp.where(some[..., 0], terms.sum(-1), 0)


def slope(scores, mass, listed):
    """Return the gradient of `divergence` of the scores."""
    p, some = target(mass, listed, scores.dtype)
    return jnp.where(listed & some, jax.nn.softmax(scores, axis=-1), 0) - p


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _listed(plan, C, q, k, w, at, mass):
    return _listed_forward(plan, C, q, k, w, at, mass)[0]


def _listed_forward(plan, C, q, k, w, at, mass):
    B, L = q.shape[:2]
    table, dtype = rows.laid(k), xla.wide(q.dtype)

    def chunk(carry, x):
        q, w, at, mass = x
        _, _, scores, listed = _listed_scores(plan, table, q, w, at, dtype)
        return carry, divergence(scores, mass, listed)

    xs = (rows.in_chunks(q, C), rows.in_chunks(w, C), rows.in_chunks(at, C, table.shape[0] - 1),
          rows.in_chunks(mass, C))
    loss = rows.out_of_chunks(lax.scan(chunk, None, xs)[1], B, L)
    return loss, (q, k, w, at, mass)


def _listed_backward(plan, C, kept, cotangent):
    # Without the barrier XLA sees what was gathered before and keeps it alive.
    (q, k, w, at, mass), cotangent = lax.optimization_barrier((kept, cotangent))
    B, L = q.shape[:2]
    table, dtype = rows.laid(k), xla.wide(q.dtype)

    def chunk(dk, x):
        q, w, at, mass, g = x
        own, raw, scores, listed = _listed_scores(plan, table, q, w, at, dtype)
        d_score = slope(scores, mass, listed) * (g * plan.scale)[:, None]
        dw = jnp.sum(jnp.maximum(raw, 0) * d_score[:, None], axis=-1)
        d_raw = jnp.where(raw > 0, d_score[:, None] * w.astype(dtype)[..., None], 0)
        d_raw = lax.optimization_barrier(narrow(d_raw, k.dtype))
        dq = jnp.einsum("cjn,cnd->cjd", d_raw, own, preferred_element_type=dtype)
        # The barrier keeps the small transpose out of the product, which is slower with it.
        d_raw_T = lax.optimization_barrier(jnp.swapaxes(d_raw, 1, 2))
        part = jnp.einsum("cnj,cjd->cnd", d_raw_T, q, preferred_element_type=dtype)
        return rows.add(dk, at, part), (narrow(dq, q.dtype), dw.astype(w.dtype))

    xs = (rows.in_chunks(q, C), rows.in_chunks(w, C), rows.in_chunks(at, C, table.shape[0] - 1),
          rows.in_chunks(mass, C), rows.in_chunks(cotangent.astype(dtype), C))
    dk, (dq, dw) = lax.scan(chunk, jnp.zeros(table.shape, dtype), xs)
    dq, dw = rows.out_of_chunks(dq, B, L), rows.out_of_chunks(dw, B, L)
    return dq, narrow(dk[:-1].reshape(k.shape), k.dtype), dw, None, None


_listed.defvjp(_listed_forward, _listed_backward)


def index_kl_listed(q_BxLxJxD, k_BxSxD, w_BxLxJ, chosen_BxLxN, mass_BxLxN, *, scale=1.0):
    """Gather and compare chunk by chunk."""
    q, (B, S), N = q_BxLxJxD, k_BxSxD.shape[:2], chosen_BxLxN.shape[2]
    if 0 in (B, q.shape[1], S, N):
        return jnp.zeros(q.shape[:2], xla.wide(q.dtype))
    queries = B * q.shape[1]
    chunks = -(-queries * N // GATHERED)
    C = -(-queries // min(chunks, queries))
    at, mass = rows.numbered(chosen_BxLxN, S), lax.stop_gradient(mass_BxLxN)
    return _listed(xla.Plan(float(scale), 1.0, 1, 1), C, q, k_BxSxD, w_BxLxJ, at, mass)


def diverging(forward, backward, plan_of):
    """Return index_kl_listed of a chip's kernels.

    forward(plan, q, k, w, at, mass) returns divergences and scores of keys by number in the batch,
    and backward(plan, kept, cotangent) the gradients of all of forward's, None for the last two.
    """
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def diverge(plan, q, k, w, at, mass):
        return forward(plan, q, k, w, at, mass)[0]

    def diverge_forward(plan, q, k, w, at, mass):
        loss, scores = forward(plan, q, k, w, at, mass)
        return loss, (q, k, w, at, mass, scores)

    diverge.defvjp(diverge_forward, backward)

    def index_kl_listed(q_BxLxJxD, k_BxSxD, w_BxLxJ, chosen_BxLxN, mass_BxLxN, *, scale=1.0):
        """Compare query by query."""
        q, (B, S), N = q_BxLxJxD, k_BxSxD.shape[:2], chosen_BxLxN.shape[2]
        if 0 in (B, q.shape[1], S, N):
            return jnp.zeros(q.shape[:2], jnp.float32)
        plan = plan_of(q, k_BxSxD, chosen_BxLxN, v_dim=1, scale=scale)
        at = rows.numbered(chosen_BxLxN, S)
        mass = lax.stop_gradient(mass_BxLxN).astype(jnp.float32)
        return diverge(plan, q, k_BxSxD, w_BxLxJ, at, mass)

    return index_kl_listed
