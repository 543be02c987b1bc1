"""The indexer's divergence over listed keys on a TPU's matrix units, forward and backward.

As in token_sparse, a chunk's keys are gathered by XLA and a query is multiplied with its own. The
kernels give the scores, and the gradients for given gradients of the scores; the softmax over a
list is XLA's.

With e[j, n] = d_score[n] where q[j].k[n] is above 0, and 0 elsewhere: dk[n] = sum_j e[j, n] w[j]
q[j], and of u[j] = sum_n e[j, n] k[n] come dq[j] = w[j] u[j] and dw[j] = q[j].u[j], both times the
scale. So no number for every head and key leaves the kernel.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import rows
from kernels_pallas.indexer import xla, xla_listed
from kernels_pallas.token_sparse import chunks, tpu_lists
from kernels_pallas.token_sparse.tpu_plan import Plan, plan_of
from kernels_pallas.tpu import dot

_F32 = jnp.float32


def _score_body(query, q, w, keys, scores):
    hits = jnp.maximum(dot(q[query], keys[query], (1, 1)), 0.0)
    scores[pl.ds(query, 1), :] = (hits * w[query]).sum(0, keepdims=True)


def _gradient_body(query, q, weighted, keys, slope, u, d_keys, acc):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[query] = jnp.zeros(acc.shape[1:], _F32)

    raw = dot(q[query], keys[query], (1, 1))
    e = jnp.where(raw > 0, slope[pl.ds(query, 1), :], 0.0).astype(keys.dtype)
    acc[query] += dot(e, keys[query], (1, 0))
    d_keys[query] = dot(e, weighted[query], (0, 0)).astype(d_keys.dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        u[query] = acc[query]


def _heads(plan: Plan, w):
    """The heads' weights with the scale in them."""
    return w.astype(_F32) * plan.scale


def _forward(plan: Plan, q, k, w, at, mass):
    """Return the loss [B, L] and the scores [B, L, N]."""
    plan = plan.sized("numbers")
    table = chunks.table(plan, k)

    def chunk(_, x):
        q, w, at, mass = x
        (scores,) = tpu_lists.over_lists(
            plan, "index_scores_listed", _score_body,
            [tpu_lists.filled(q, plan.R, plan.D), tpu_lists.column(plan, _heads(plan, w))],
            [rows.read(table, tpu_lists.listed(plan, at))], [],
            [tpu_lists.shape(plan, "number", 0, _F32)])
        known = at < plan.tokens
        scores = jnp.where(known, scores[:, :plan.N], xla.NOTHING)
        return None, (xla_listed.divergence(scores, mass, known), scores)

    xs = [(q, 0), (w, 0), (at, plan.tokens), (mass, 0)]
    return chunks.scan(plan, chunk, None, xs)[1]


def _backward(plan: Plan, kept, cotangent):
    q, k, w, at, mass, scores = kept
    plan, dtype = plan.sized("slopes"), k.dtype
    table = chunks.table(plan, k)

    def chunk(d_table, x):
        q, w, at, mass, scores, g = x
        slope = xla_listed.slope(scores, mass, at < plan.tokens) * g[:, None]
        weighted = (q.astype(_F32) * _heads(plan, w)[..., None]).astype(dtype)
        at = tpu_lists.listed(plan, at)
        u, d_keys = tpu_lists.over_lists(
            plan, "index_gradient_listed", _gradient_body,
            [tpu_lists.filled(x, plan.R, plan.D) for x in (q, weighted)], [rows.read(table, at)],
            [tpu_lists.filled(slope, plan.listed)],
            [tpu_lists.shape(plan, "query", plan.D, _F32),
             tpu_lists.shape(plan, "token", plan.D, dtype)], scratch=[(plan.R, plan.D)])
        u = u[:, :plan.H, :plan.Dk]
        dq = (u * _heads(plan, w)[..., None]).astype(dtype)
        dw = ((q.astype(_F32) * u).sum(-1) * plan.scale).astype(dtype)
        return d_table + tpu_lists.add_up(plan, d_keys, at), (dq, dw)

    d_table, (dq, dw) = chunks.scan(plan, chunk, jnp.zeros((plan.tokens, plan.D), _F32), [
        (q, 0), (w, 0), (at, plan.tokens), (mass, 0), (scores, xla.NOTHING),
        (cotangent.astype(_F32), 0)])
    return dq, d_table[:, :plan.Dk].reshape(k.shape).astype(dtype), dw, None, None


index_kl_listed = xla_listed.diverging(_forward, _backward, functools.partial(
    plan_of, "index_kl_listed"))
