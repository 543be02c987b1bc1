"""Attention to listed tokens on a TPU's matrix units, accumulated in float32.

Tokens are gathered by XLA, for keys and values at once (tpu_plan.py says why), and a list is gone
through with a running softmax. The backward pass scores again and gives a query's gradients and
those that it has for its tokens, which are then added up by token in one order: the same bits every
time.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import rows
from kernels_pallas.token_sparse import chunks, tpu_lists
from kernels_pallas.token_sparse.tpu_plan import EMPTY, NOTHING, Plan, plan_of
from kernels_pallas.tpu import dot

_F32 = jnp.float32


def _score(plan: Plan, query, q, keys, at):
    """Scores [R, n] of a query's heads and tokens, NOTHING for none."""
    scores = dot(q[query], keys[query], (1, 1)) * plan.scale
    return jnp.where(at[pl.ds(query, 1), :] < plan.tokens, scores, NOTHING)


def _forward_body(plan: Plan, query, q, keys, at, o, lse, top, total, acc):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        top[query] = jnp.full(top.shape[1:], EMPTY, _F32)
        total[query] = jnp.zeros(total.shape[1:], _F32)
        acc[query] = jnp.zeros(acc.shape[1:], _F32)

    scores = _score(plan, query, q, keys, at)
    highest = jnp.maximum(top[query], scores.max(1, keepdims=True))
    weights = jnp.exp(scores - highest)
    shrink = jnp.exp(top[query] - highest)
    total[query] = total[query] * shrink + weights.sum(1, keepdims=True)
    values = keys[query, :, :plan.V]
    acc[query] = acc[query] * shrink + dot(weights.astype(values.dtype), values, (1, 0))
    top[query] = highest

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        some = total[query] > 0
        whole = jnp.where(some, total[query], 1.0)
        o[query] = (acc[query] / whole).astype(o.dtype)
        lse[query] = jnp.where(some, top[query] + jnp.log(whole), NOTHING)


def _backward_body(plan: Plan, query, q, do, lse, delta, keys, at, dq, d_keys, acc):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[query] = jnp.zeros(acc.shape[1:], _F32)

    weights = jnp.exp(_score(plan, query, q, keys, at) - lse[query])
    d_weights = dot(do[query], keys[query, :, :plan.V], (1, 1))
    d_scores = (weights * (d_weights - delta[query]) * plan.scale).astype(dq.dtype)
    acc[query] += dot(d_scores, keys[query], (1, 0))
    as_key = dot(d_scores, q[query], (0, 0))
    as_value = dot(weights.astype(dq.dtype), do[query], (0, 0))
    d_keys[query, :, :plan.V] = (as_key[:, :plan.V] + as_value).astype(d_keys.dtype)
    if plan.V < plan.D:
        d_keys[query, :, plan.V:] = as_key[:, plan.V:].astype(d_keys.dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dq[query] = acc[query].astype(dq.dtype)


def _mass_body(plan: Plan, query, q, lse, keys, at, mass):
    weights = jnp.exp(_score(plan, query, q, keys, at) - lse[query])
    mass[pl.ds(query, 1), :] = weights.sum(0, keepdims=True)


def _forward(plan: Plan, q, kv, at):
    """Return o [B, L, H, v_dim] and lse [B, L, H]."""
    plan = plan.sized("forward")
    table, dtype = chunks.table(plan, kv), kv.dtype

    def chunk(_, x):
        q, at = x
        at = tpu_lists.listed(plan, at)
        o, lse = tpu_lists.over_lists(
            plan, "token_sparse", functools.partial(_forward_body, plan),
            [tpu_lists.filled(q, plan.R, plan.D)], [rows.read(table, at)], [at],
            [tpu_lists.shape(plan, "query", plan.V, dtype),
             tpu_lists.shape(plan, "query", 1, _F32)],
            scratch=[(plan.R, 1), (plan.R, 1), (plan.R, plan.V)])
        return None, (o[:, :plan.H, :plan.v_dim], lse[:, :plan.H, 0])

    return chunks.scan(plan, chunk, None, [(q, 0), (at, plan.tokens)])[1]


def _unseen(lse):
    """Denominators for which rows without tokens weigh exp(-1e30 - 1e30) = 0."""
    return jnp.where(lse < EMPTY, -NOTHING, lse)


def _backward(plan: Plan, q, kv, at, lse, delta, do):
    plan = plan.sized("backward")
    table, dtype = chunks.table(plan, kv), kv.dtype

    def chunk(d_kv, x):
        q, do, lse, delta, at = x
        at = tpu_lists.listed(plan, at)
        dq, d_keys = tpu_lists.over_lists(
            plan, "token_sparse_gradient", functools.partial(_backward_body, plan),
            [tpu_lists.filled(q, plan.R, plan.D), tpu_lists.filled(do, plan.R, plan.V),
             tpu_lists.column(plan, lse, -NOTHING), tpu_lists.column(plan, delta)],
            [rows.read(table, at)], [at],
            [tpu_lists.shape(plan, "query", plan.D, dtype),
             tpu_lists.shape(plan, "token", plan.D, dtype)],
            scratch=[(plan.R, plan.D)])
        return d_kv + tpu_lists.add_up(plan, d_keys, at), dq[:, :plan.H, :plan.Dk]

    d_kv, dq = chunks.scan(plan, chunk, jnp.zeros((plan.tokens, plan.D), _F32), [
        (q, 0), (do, 0), (_unseen(lse), -NOTHING), (delta, 0), (at, plan.tokens)])
    return dq, d_kv[:, :plan.Dk].reshape(kv.shape).astype(dtype)


token_sparse = chunks.attention(_forward, _backward, functools.partial(plan_of, "token_sparse"))


def token_mass(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, lse_BxLxH, *, scale):
    """Score query by query."""
    q, kv, lse = lax.stop_gradient((q_BxLxHxDk, kv_BxSxDk, lse_BxLxH))
    (B, L), S, N = q.shape[:2], kv.shape[1], chosen_BxLxN.shape[2]
    if 0 in (B, L, S, N):
        return jnp.zeros((B, L, N), _F32)
    plan = plan_of("token_mass", q, kv, chosen_BxLxN, v_dim=1, scale=scale).sized("numbers")
    table = chunks.table(plan, kv)

    def chunk(_, x):
        q, lse, at = x
        at = tpu_lists.listed(plan, at)
        (mass,) = tpu_lists.over_lists(
            plan, "token_mass", functools.partial(_mass_body, plan),
            [tpu_lists.filled(q, plan.R, plan.D), tpu_lists.column(plan, lse, -NOTHING)],
            [rows.read(table, at)], [at], [tpu_lists.shape(plan, "number", 0, _F32)])
        return None, mass[:, :N]

    return chunks.scan(plan, chunk, None, [
        (q, 0), (_unseen(lse.astype(_F32)), -NOTHING), (rows.numbered(chosen_BxLxN, S),
                                                       plan.tokens)])[1]
