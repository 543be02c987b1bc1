"""What the TPU kernels over listed tokens share: calls over queries and lists, sums by token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.grouped_matmul import contiguous, mosaic_tpu
from kernels_pallas.token_sparse.tpu_plan import QUERIES, Plan

_F32 = jnp.float32
_OWNED = 128  # tokens that are summed by one product


def over_lists(plan: Plan, name, body, by_query, by_token, numbers, outs, scratch=()):
    """Call `body(query, refs)` for every query of a chunk and every step of its list.

    `by_query` are arrays [chunk, R, ...], `by_token` [chunk, listed, D] and `numbers`
    [chunk, listed]; a query's body reads them at `query`, and numbers at `pl.ds(query, 1)`. `outs`
    are shapes of such arrays, by their names: 'query', 'token' or 'number'. `scratch` are shapes
    of float32 memory of a query, which stays from step to step. Refs are in this order.
    """
    def of_query(x):
        return pl.BlockSpec((QUERIES, *x.shape[1:]), lambda i, step: (i, 0, 0))

    def of_token(x):
        return pl.BlockSpec((QUERIES, plan.n, x.shape[2]), lambda i, step: (i, step, 0))

    def of_number(_):
        return pl.BlockSpec((QUERIES, plan.n), lambda i, step: (i, step))

    def every(*refs):
        def one(query, _):
            body(query, *refs)

        lax.fori_loop(0, QUERIES, one, None)

    specs = {"query": of_query, "token": of_token, "number": of_number}
    shapes = [x for _, x in outs]
    return tpu.call(
        every, name, shapes, ("parallel", "arbitrary"), grid=(plan.chunk // QUERIES, plan.steps),
        in_specs=[*map(of_query, by_query), *map(of_token, by_token), *map(of_number, numbers)],
        out_specs=[specs[kind](x) for kind, x in outs],
        scratch_shapes=[pltpu.VMEM((QUERIES, *shape), _F32) for shape in scratch],
    )(*by_query, *by_token, *numbers)


def shape(plan: Plan, kind: str, width: int, dtype: Any) -> tuple[str, jax.ShapeDtypeStruct]:
    """Return the kind and shape of a result; `width` of a row, nothing for numbers of tokens."""
    dims = {"query": (plan.chunk, plan.R, width), "token": (plan.chunk, plan.listed, width),
            "number": (plan.chunk, plan.listed)}
    return kind, jax.ShapeDtypeStruct(dims[kind], dtype)


def filled(x, *sizes, fill=0):
    """Fill up the dims after the first to these sizes."""
    widths = ((0, 0), *((0, size - n) for n, size in zip(x.shape[1:], sizes, strict=True)))
    return jnp.pad(x, widths, constant_values=fill)


def column(plan: Plan, x, fill=0):
    """Return numbers of heads [chunk, H] as columns [chunk, R, 1]."""
    return filled(x.astype(_F32), plan.R, fill=fill)[..., None]


def listed(plan: Plan, at):
    """Return the lists [chunk, N] as they are in memory, [chunk, listed]."""
    return filled(at, plan.listed, fill=plan.tokens)


def add_up(plan: Plan, d, at):
    """Return sums [tokens, D] in float32 of the rows d [chunk, listed, D] where `at` is a token.

    The rows are sorted by token, and 128 tokens are a group of grouped_matmul's: their sums are
    the gradient of a matrix whose input tells the token by a one. Every sum has one order, and the
    same bits come every time.
    """
    at, d = at.reshape(-1), d.reshape(-1, plan.D)
    order = jnp.argsort(at, stable=True)
    at = at[order]
    d = d.at[order].get(mode="promise_in_bounds")
    groups = -(-plan.tokens // _OWNED)
    edges = jnp.minimum(jnp.arange(groups + 1, dtype=jnp.int32) * _OWNED, plan.tokens)
    edges = jnp.searchsorted(at, edges).astype(jnp.int32)
    layout = contiguous(jnp.diff(edges), edges[:-1], at.shape[0], 1)
    own = (at[:, None] % _OWNED == jnp.arange(_OWNED, dtype=jnp.int32)[None]).astype(d.dtype)
    return mosaic_tpu.weight_gradient(own, d, layout, _F32).reshape(-1, plan.D)[:plan.tokens]
