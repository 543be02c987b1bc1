"""Attention to listed tokens for any platform, with its own backward pass.

Queries of all rows of the batch go by chunks: a chunk's tokens are gathered once, for keys and
values and all heads, and a query is multiplied with its own. Only o and lse are kept; the backward
pass gathers and scores again. Letters beside the house's: C queries of a chunk, R rows of the kv
tables of the batch laid end to end, and a row of zeros for a slot that lists nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import rows
from kernels_pallas.rounding import narrow

# A row that lists nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = -1e30, -1e29
# Tokens gathered at once. Measured (jax 0.12, bfloat16, 8 heads, widths 80 and 64, 128 tokens of
# each query, forward and backward), nanoseconds of processor time per token read:
#   4,096 queries and tokens    2,048: 183, 4,096: 161, 8,192: 163, 16,384: 160, 32,768: 166
#   32,768 queries and tokens               4,096: 189, 8,192: 190, 16,384: 186, 32,768: 187
# and wall time is least at 16,384. Of the 160, gathers cost about 10, products 100
# and the sum back to tokens 20 (rows.py). Weights laid out over all tokens, for one dense product
# in place of that sum, cost 600 at 4,096 tokens; pairs sorted by token 45, the sort alone.
GATHERED = 1 << 14


class Plan(NamedTuple):
    """All that is known when tracing."""

    scale: float
    v_dim: int
    chunk: int  # queries


def _wide(dtype):
    """Return the dtype of scores and sums: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def plan_of(scale, v_dim, queries, N):
    """Cut the queries in chunks of equal size."""
    chunks = -(-queries * N // GATHERED)
    return Plan(float(scale), v_dim, -(-queries // min(chunks, queries)))


def distinct(rows_BxLxN, nothing):
    """Return the lists sorted, with `nothing` for a repetition."""
    ordered = jnp.sort(rows_BxLxN, axis=-1)
    again = ordered[..., 1:] == ordered[..., :-1]
    again = jnp.pad(again, ((0, 0), (0, 0), (1, 0)))
    return jnp.where(again, nothing, ordered)


# The products, in the orders that XLA:CPU runs on the matrix units (flash/pairs.py).


def _score(q_CxHxD, kv_CxNxD, dtype):
    return jnp.einsum("chd,cnd->chn", q_CxHxD, kv_CxNxD, preferred_element_type=dtype)


def _weigh(w_CxHxN, kv_CxNxD, dtype):
    return jnp.einsum("chn,cnd->chd", w_CxHxN, kv_CxNxD, preferred_element_type=dtype)


def _spread(w_CxHxN, q_CxHxD, dtype):
    # The barrier keeps the small transpose out of the product, which is slower with it.
    w_CxNxH = lax.optimization_barrier(jnp.swapaxes(w_CxHxN, 1, 2))
    return jnp.einsum("cnh,chd->cnd", w_CxNxH, q_CxHxD, preferred_element_type=dtype)


def _bias(at_CxN, nothing, dtype):
    """0 for a token and NOTHING for none, [C, 1, N]."""
    zero, none = jnp.zeros((), dtype), jnp.full((), NOTHING, dtype)
    return jnp.where(at_CxN < nothing, zero, none)[:, None]


def _forward_chunk(plan, kv, carry, x):
    q, at = x
    dtype = _wide(q.dtype)
    own = lax.optimization_barrier(rows.read(kv, at))
    scores = _score(q, own, dtype) * np.asarray(plan.scale, dtype)
    scores += _bias(at, kv.shape[0] - 1, dtype)
    top = jnp.maximum(scores.max(-1), np.asarray(EMPTY, dtype))
    # One array for the sum and the product, or the exponential is computed for each.
    weights = lax.optimization_barrier(narrow(jnp.exp(scores - top[..., None]), q.dtype))
    total = weights.astype(dtype).sum(-1)
    some = total > 0
    total = jnp.where(some, total, jnp.ones_like(total))
    # All dims of the tokens are weighed, for no copy of the first few.
    o = _weigh(weights, own, dtype)[..., :plan.v_dim] / total[..., None]
    return carry, (narrow(o, q.dtype), jnp.where(some, top + jnp.log(total), NOTHING))


def _forward(plan, q, kv, at):
    """Return o [B, L, H, v_dim] and lse [B, L, H]."""
    B, L = q.shape[:2]
    table = rows.laid(kv)
    xs = (rows.in_chunks(q, plan.chunk), rows.in_chunks(at, plan.chunk, table.shape[0] - 1))
    _, (o, lse) = lax.scan(functools.partial(_forward_chunk, plan, table), None, xs)
    return rows.out_of_chunks(o, B, L), rows.out_of_chunks(lse, B, L)


def _backward_chunk(plan, kv, d_kv, x):
    q_do, at, lse, delta = x
    dtype, H = _wide(q_do.dtype), lse.shape[1]
    scale = np.asarray(plan.scale, dtype)
    own = lax.optimization_barrier(rows.read(kv, at))
    raw = _score(q_do, own, dtype)
    scores = raw[:, :H] * scale + _bias(at, kv.shape[0] - 1, dtype)
    weights = jnp.exp(scores - lse[..., None])
    d_scores = weights * (raw[:, H:] - delta[..., None]) * scale
    both = lax.optimization_barrier(narrow(jnp.concatenate([d_scores, weights], 1), q_do.dtype))
    dq = narrow(_weigh(both[:, :H], own, dtype), q_do.dtype)
    return rows.add(d_kv, at, _spread(both, q_do, dtype)), dq


def _backward(plan, q, kv, at, lse, delta, do):
    B, L = q.shape[:2]
    table, nothing = rows.laid(kv), np.asarray(-NOTHING, lse.dtype)
    # A row without tokens: its weights are exp(score - 1e30) = 0.
    lse = jnp.where(lse < EMPTY, nothing, lse)
    # Keys meet q and values do, in one product: values are keys' first dims.
    do = jnp.pad(do, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - plan.v_dim)))
    xs = (rows.in_chunks(jnp.concatenate([q, do], 2), plan.chunk),
          rows.in_chunks(at, plan.chunk, table.shape[0] - 1),
          rows.in_chunks(lse, plan.chunk, -NOTHING), rows.in_chunks(delta, plan.chunk))
    d_kv = jnp.zeros(table.shape, lse.dtype)
    d_kv, dq = lax.scan(functools.partial(_backward_chunk, plan, table), d_kv, xs)
    return rows.out_of_chunks(dq, B, L), narrow(d_kv[:-1].reshape(kv.shape), kv.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, kv, at):
    return _forward(plan, q, kv, at)


def _attend_forward(plan, q, kv, at):
    o, lse = _forward(plan, q, kv, at)
    return (o, lse), (q, kv, at, o, lse)


def _attend_backward(plan, kept, cotangents):
    # Without the barrier XLA sees what was gathered before and keeps it alive.
    (q, kv, at, o, lse), (do, d_lse) = lax.optimization_barrier((kept, cotangents))
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - d_lse
    dq, d_kv = _backward(plan, q, kv, at, lse, delta, do)
    return dq, d_kv, None


_attend.defvjp(_attend_forward, _attend_backward)


def token_sparse(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, *, v_dim, scale, unique=False,
                 return_lse=False):
    """Attend chunk by chunk."""
    (B, L, H), S, N = q_BxLxHxDk.shape[:3], kv_BxSxDk.shape[1], chosen_BxLxN.shape[2]
    if 0 in (B, L, S, N):
        o = jnp.zeros((B, L, H, v_dim), kv_BxSxDk.dtype)
        lse = jnp.full((B, L, H), NOTHING, _wide(o.dtype))
    else:
        at = rows.numbered(chosen_BxLxN, S)
        at = at if unique else distinct(at, B * S)
        o, lse = _attend(plan_of(scale, v_dim, B * L, N), q_BxLxHxDk, kv_BxSxDk, at)
    return (o, lse) if return_lse else o


def part_gradients(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, do_BxLxHxDv, lse_BxLxH, delta_BxLxH, *,
                   v_dim, scale, unique=False):
    """Return dq and d_kv of this part in a softmax over these tokens and other keys.

    Shapes: as of `token_sparse`; lse is of all keys, and delta sum(do * o) over the width less the
        gradient of lse.
    """
    (B, L), S, N = q_BxLxHxDk.shape[:2], kv_BxSxDk.shape[1], chosen_BxLxN.shape[2]
    if 0 in (B, L, S, N):
        return jnp.zeros_like(q_BxLxHxDk), jnp.zeros_like(kv_BxSxDk)
    at = rows.numbered(chosen_BxLxN, S)
    at = at if unique else distinct(at, B * S)
    return _backward(plan_of(scale, v_dim, B * L, N), q_BxLxHxDk, kv_BxSxDk, at, lse_BxLxH,
                     delta_BxLxH, do_BxLxHxDv)


def token_mass(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, lse_BxLxH, *, scale):
    """Score chunk by chunk."""
    q, kv, lse = lax.stop_gradient((q_BxLxHxDk, kv_BxSxDk, lse_BxLxH))
    (B, L), S, N = q.shape[:2], kv.shape[1], chosen_BxLxN.shape[2]
    dtype = _wide(q.dtype)
    if 0 in (B, L, S, N):
        return jnp.zeros((B, L, N), dtype)
    plan, table = plan_of(scale, 1, B * L, N), rows.laid(kv)
    at = rows.numbered(chosen_BxLxN, S)

    def chunk(carry, x):
        q, at, lse = x
        own = lax.optimization_barrier(rows.read(table, at))
        scores = lax.optimization_barrier(_score(q, own, dtype)) * np.asarray(plan.scale, dtype)
        bias = _bias(at, B * S, dtype)[:, 0]
        # Head by head: XLA:CPU (jax 0.12) vectorises no sum along a dim that is not the last.
        weights = [jnp.exp(scores[:, h] + bias - lse[:, h, None]) for h in range(lse.shape[1])]
        return carry, functools.reduce(jnp.add, weights)

    # A row without tokens: exp(-1e30 - 1e30) = 0.
    lse = jnp.where(lse < EMPTY, -NOTHING, lse.astype(dtype))
    xs = (rows.in_chunks(q, plan.chunk), rows.in_chunks(at, plan.chunk, B * S),
          rows.in_chunks(lse, plan.chunk))
    return rows.out_of_chunks(lax.scan(chunk, None, xs)[1], B, L)
