"""Cross-entropy of a linear head on a TPU: logits exist a tile at a time, in fast memory.

The forward pass runs over the vocabulary with a running softmax and keeps one number per token,
the logarithm of its denominator. The backward pass computes the tiles of logits again, once for
the tokens' gradient and once for the head's: five products in all, and no memory for logits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.cross_entropy import tiles

_NOTHING = -1e30  # a logit beyond the vocabulary


class Plan(NamedTuple):
    """All that is known when tracing. `m`, `n` are a tile's tokens and vocabulary entries."""

    T: int
    D: int
    V: int
    z_loss: float
    softcap: float | None
    layout: str
    m: int = 0
    n: int = 0

    def sized(self, product, itemsize):
        """Return the plan with the tiles of one kernel."""
        return self._replace(**tiles.choose(product, self.T, self.D, self.V, itemsize)._asdict())


def _logits(plan, x, head, number):
    """Logits [m, n] of one tile, and the vocabulary entry of every column."""
    logits = tpu.dot(x, head, (1, 0 if plan.layout == "DV" else 1))
    if plan.softcap is not None:
        logits = jnp.tanh(logits / plan.softcap) * plan.softcap
    entry = number * plan.n + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return logits, entry


def _within(a, dim, count):
    """Zeros beyond `count` along a dim: what lies beyond an array may be anything."""
    index = lax.broadcasted_iota(jnp.int32, a.shape, dim)
    return jnp.where(index < count, a, jnp.zeros(a.shape, a.dtype))


def _forward_body(plan, x, head, targets, lse, nll, top, total, chosen):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, _NOTHING, jnp.float32)
        total[...] = jnp.zeros_like(total)
        chosen[...] = jnp.zeros_like(chosen)

    logits, entry = _logits(plan, x[...], head[...], j)
    if plan.V % plan.n:
        logits = jnp.where(entry < plan.V, logits, _NOTHING)
    highest = jnp.maximum(top[...], logits.max(1, keepdims=True))
    now = jnp.exp(logits - highest).sum(1, keepdims=True)
    total[...] = total[...] * jnp.exp(top[...] - highest) + now
    top[...] = highest
    chosen[...] += jnp.where(entry == targets[...], logits, 0.0).sum(1, keepdims=True)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        lse[...] = top[...] + jnp.log(total[...])
        nll[...] = lse[...] - chosen[...]


def _d_logits(plan, x, head, targets, row, lse, number, tokens):
    """Gradient of the logits [m, n], exact zeros for tokens of weight 0 and beyond the arrays."""
    logits, entry = _logits(plan, x, head, number)
    soft = jnp.exp(logits - lse)
    if plan.z_loss:
        soft = soft * (1 + 2 * plan.z_loss * lse)
    d = row * (soft - jnp.where(entry == targets, 1.0, 0.0))
    if plan.softcap is not None:
        bent = logits / plan.softcap
        d = d * (1 - bent * bent)
    keep = (row != 0) & (entry < plan.V)
    if tokens is not None:
        keep &= lax.broadcasted_iota(jnp.int32, d.shape, 0) < tokens
    return jnp.where(keep, d, 0.0).astype(x.dtype)


def _dx_body(plan, x, head, targets, row, lse, dx, acc):
    j = pl.program_id(1)

    def step(head_values):
        d = _d_logits(plan, x[...], head_values, targets[...], row[...], lse[...], j, None)
        part = tpu.dot(d, head_values, (1, 1 if plan.layout == "DV" else 0))
        acc[...] = jnp.where(j == 0, part, acc[...] + part)

    last = j == pl.num_programs(1) - 1
    rest = plan.V % plan.n
    if rest:
        along = 1 if plan.layout == "DV" else 0
        pl.when(last)(lambda: step(_within(head[...], along, rest)))
        pl.when(jnp.logical_not(last))(lambda: step(head[...]))
    else:
        step(head[...])

    @pl.when(last)
    def _():
        dx[...] = acc[...].astype(dx.dtype)


def _dhead_body(plan, x, head, targets, row, lse, dhead, acc):
    j, i = pl.program_id(0), pl.program_id(1)

    def step(x_values, tokens):
        d = _d_logits(plan, x_values, head[...], targets[...], row[...], lse[...], j, tokens)
        pair = (x_values, d) if plan.layout == "DV" else (d, x_values)
        part = tpu.dot(*pair, (0, 0))
        acc[...] = jnp.where(i == 0, part, acc[...] + part)

    last = i == pl.num_programs(1) - 1
    rest = plan.T % plan.m
    if rest:
        pl.when(last)(lambda: step(_within(x[...], 0, rest), rest))
        pl.when(jnp.logical_not(last))(lambda: step(x[...], None))
    else:
        step(x[...], None)

    @pl.when(last)
    def _():
        dhead[...] = acc[...].astype(dhead.dtype)


def _call(plan, body, name, order, out, out_spec, scratch, *arrays):
    """Run a kernel over tiles of tokens and vocabulary; `order` names the two loops."""
    grid = {"T": pl.cdiv(plan.T, plan.m), "V": pl.cdiv(plan.V, plan.n)}

    def at(dims):
        places = [order.index(d) if d else None for d in dims]
        return lambda *index: tuple(0 if p is None else index[p] for p in places)

    head_block, head_at = (((plan.D, plan.n), at(("", "V"))) if plan.layout == "DV"
                           else ((plan.n, plan.D), at(("V", ""))))
    token = pl.BlockSpec((plan.m, 1), at(("T", "")))
    specs = {"x": pl.BlockSpec((plan.m, plan.D), at(("T", ""))),
             "head": pl.BlockSpec(head_block, head_at), "token": token}
    in_specs = [specs["x"], specs["head"]] + [token] * (len(arrays) - 2)
    return tpu.call(
        functools.partial(body, plan), name, out, ("parallel", "arbitrary"),
        grid=(grid[order[0]], grid[order[1]]), in_specs=in_specs,
        out_specs=jax.tree.map(lambda s: specs[s], out_spec),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )(*arrays)


def _logsumexp(plan, x, head, targets):
    """Return (lse, nll), [T, 1] each."""
    plan = plan.sized("forward", x.dtype.itemsize)
    token = jax.ShapeDtypeStruct((plan.T, 1), jnp.float32)
    return _call(plan, _forward_body, "cross_entropy", "TV", (token, token), ("token", "token"),
                 [(plan.m, 1)] * 3, x, head, targets)


def _sum(plan, weights, nll, lse):
    each = nll + plan.z_loss * lse * lse if plan.z_loss else nll
    return jnp.where(weights == 0, jnp.zeros_like(each), weights * each).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(plan, x, head, targets, weights):
    return _forward(plan, x, head, targets, weights)[0]


def _forward(plan, x, head, targets, weights):
    lse, nll = _logsumexp(plan, x, head.astype(x.dtype), targets)
    return (_sum(plan, weights, nll, lse), nll[:, 0]), (x, head, targets, weights, lse)


def _backward(plan, kept, cotangents):
    x, head, targets, weights, lse = kept
    cast, size = head.astype(x.dtype), x.dtype.itemsize
    row = weights * cotangents[0].astype(jnp.float32)
    arrays = (x, cast, targets, row, lse)
    small = plan.sized("dx", size)
    dx = _call(small, _dx_body, "cross_entropy_dx", "TV", jax.ShapeDtypeStruct(x.shape, x.dtype),
               "x", [(small.m, plan.D)], *arrays)
    small = plan.sized("dhead", size)
    acc = (plan.D, small.n) if plan.layout == "DV" else (small.n, plan.D)
    dhead = _call(small, _dhead_body, "cross_entropy_dhead", "VT",
                  jax.ShapeDtypeStruct(head.shape, head.dtype), "head", [acc], *arrays)
    return dx, dhead, None, None


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(x_TxD, head, targets_T, weights_T, *, z_loss=0.0, softcap=None, chunk=None,
                  head_layout="DV"):
    """Sum the weighted losses tile by tile; the chunk means nothing here."""
    del chunk
    T, D = x_TxD.shape
    spare = -T % tiles.ROWS

    def column(a, dtype):
        return jnp.pad(a.astype(dtype), (0, spare))[:, None]

    plan = Plan(T + spare, D, head.size // D, float(z_loss),
                None if softcap is None else float(softcap), head_layout)
    total, nll = _cross_entropy(plan, jnp.pad(x_TxD, ((0, spare), (0, 0))), head,
                                column(targets_T, jnp.int32), column(weights_T, jnp.float32))
    return total, nll[:T]
