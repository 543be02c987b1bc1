"""Queries by chunks against a table of tokens that they list: what the kernels of chips share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import rows
from kernels_pallas.token_sparse.xla import NOTHING, distinct


def table(plan, kv):
    """Return the tokens of the batch end to end and a row of zeros, as wide as in memory."""
    return jnp.pad(rows.laid(kv), ((0, 0), (0, plan.D - plan.Dk)))


def scan(plan, step, carry, xs):
    """Go through the queries [B, L, ...] by chunks; results are [B, L, ...]."""
    xs = [rows.in_chunks(x, plan.chunk, fill) for x, fill in xs]
    if xs[0].shape[0] == 1:  # no loop to compile
        carry, out = step(carry, [x[0] for x in xs])
        out = jax.tree.map(lambda x: x[None], out)
    else:
        carry, out = lax.scan(step, carry, xs)
    return carry, jax.tree.map(lambda x: rows.out_of_chunks(x, plan.B, plan.L), out)


def attention(forward, backward, plan_of):
    """Return token_sparse of a chip's kernels.

    forward(plan, q, kv, at) returns values and log-sum-exp of tokens by number in the batch, and
    backward(plan, q, kv, at, lse, delta, do) the gradients of q and kv.
    """
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(plan, q, kv, at):
        return forward(plan, q, kv, at)

    def attend_forward(plan, q, kv, at):
        o, lse = forward(plan, q, kv, at)
        return (o, lse), (q, kv, at, o, lse)

    def attend_backward(plan, kept, cotangents):
        (q, kv, at, o, lse), (do, d_lse) = kept, cotangents
        delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - d_lse
        return *backward(plan, q, kv, at, lse, delta, do), None

    attend.defvjp(attend_forward, attend_backward)

    def token_sparse(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, *, v_dim, scale, unique=False,
                     return_lse=False):
        """Attend query by query."""
        (B, L, H), S, N = q_BxLxHxDk.shape[:3], kv_BxSxDk.shape[1], chosen_BxLxN.shape[2]
        if 0 in (B, L, S, N):
            o = jnp.zeros((B, L, H, v_dim), kv_BxSxDk.dtype)
            lse = jnp.full((B, L, H), NOTHING, jnp.float32)
        else:
            at = rows.numbered(chosen_BxLxN, S)
            at = at if unique else distinct(at, B * S)
            plan = plan_of(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, v_dim=v_dim, scale=scale)
            o, lse = attend(plan, q_BxLxHxDk, kv_BxSxDk, at)
        return (o, lse) if return_lse else o

    return token_sparse
