"""block_sparse by kernels that multiply a tile of queries with a block: all that is around them.

Pairs of a query and a block are sorted by block and cut into tiles of one block each (tiles.py).
The results of a query's choices are merged by the logarithms of their denominators, by number and
never by adding to memory: the same bits every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import rows
from kernels_pallas.block_sparse import tiles
from kernels_pallas.block_sparse.plan import EMPTY, NOTHING, Plan

_F32 = jnp.float32


class Kernels(NamedTuple):
    """What runs on tiles.

    forward(plan, q, found, k, v) returns o [Z x X, Dv] of every row over its tile's block alone,
    and lse [Z x X]. backward(plan, q, do, lse, delta, found, k, v) returns dq / scale [Z x X, Dk],
    and dk / scale [E, block, Dk] and dv [E, block, Dv] in float32, zeros where no tile is.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    multiple: int = 1  # of tiles there are


def _groups(plan: Plan, blocks):
    """Return the group of every pair, plan.groups for none: [B x L, G, N]."""
    blocks = tiles.distinct(blocks, plan.M)
    head = jnp.arange(plan.G, dtype=jnp.int32) // (plan.G // plan.K)
    lane = jnp.arange(plan.B, dtype=jnp.int32)[:, None] * plan.K + head[None, :]
    group = lane[:, None, :, None] * plan.M + blocks
    return jnp.where(blocks < 0, plan.groups, group)


def _cut(kernels: Kernels, plan: Plan, group):
    """Cut a chunk's pairs into tiles."""
    return tiles.cut(group.reshape(-1, plan.N), plan.groups, plan.T, kernels.multiple,
                     method="scan_unrolled")


def _by_block(plan: Plan, x, starts):
    """Return the keys [B, S, K, D] of every group: [E x block, D]."""
    at = jnp.arange(plan.block, dtype=jnp.int32)
    at = jnp.clip(starts.astype(jnp.int32)[:, :, None] + at[None, None], 0, plan.S - 1)
    x = jnp.take_along_axis(x, at.reshape(plan.B, -1)[:, :, None, None], axis=1)
    return x.swapaxes(1, 2).reshape(-1, x.shape[-1])


def _sort(plan: Plan, x, row_ZxT, fill=0):
    """Return rows [chunk x G, R, ...] by slot: [Z x X, ...], `fill` where there is none."""
    rest = x.shape[2:]
    x = jnp.pad(x.reshape(x.shape[0], -1), ((0, 1), (0, 0)), constant_values=fill)
    x = x.at[row_ZxT].get(mode="promise_in_bounds")
    x = x.reshape(row_ZxT.shape[0], plan.T * plan.R, *rest)
    widths = ((0, 0), (0, plan.X - x.shape[1]), *((0, 0) for _ in rest))
    return jnp.pad(x, widths, constant_values=fill).reshape(-1, *rest)


def _unsorted(plan: Plan, x):
    """Return what tiles hold [Z x X, ...] by slot: [Z x T, R, ...]."""
    x = x.reshape(-1, plan.X, *x.shape[1:])[:, :plan.T * plan.R]
    return x.reshape(-1, plan.R, *x.shape[2:])


def _choice(x, slot, some, nothing=0):
    """Read slots [rows], `nothing` where there is none: [rows, R, ...]."""
    read = x.at[jnp.where(some, slot, 0)].get(mode="promise_in_bounds").astype(_F32)
    return jnp.where(some.reshape(-1, *(1 for _ in x.shape[1:])), read, nothing)


def _forward_chunk(kernels: Kernels, plan: Plan, k, v, _, chunk):
    q, group = chunk
    found = _cut(kernels, plan, group)
    q = _sort(plan, q.reshape(-1, plan.R, plan.Dk), found.row)
    o, lse = (_unsorted(plan, x) for x in kernels.forward(plan, q, found, k, v))
    some = found.slot < found.row.size
    parts = [_choice(lse, found.slot[:, n], some[:, n], NOTHING) for n in range(plan.N)]
    top = jnp.maximum(functools.reduce(jnp.maximum, parts), EMPTY)
    weights = [jnp.exp(part - top) for part in parts]
    total = functools.reduce(jnp.add, weights)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    merged = sum(_choice(o, found.slot[:, n], some[:, n]) * (weights[n] / total)[..., None]
                 for n in range(plan.N))
    return None, (merged.astype(q.dtype), jnp.where(seen, top + jnp.log(total), NOTHING))


def _backward_chunk(kernels: Kernels, plan: Plan, k, v, carry, chunk):
    q, do, lse, delta, group = chunk
    found = _cut(kernels, plan, group)
    q, do = (_sort(plan, x.reshape(-1, plan.R, x.shape[-1]), found.row) for x in (q, do))
    # A slot without a pair weighs exp(0 - 1e30) = 0.
    lse = _sort(plan, lse.reshape(-1, plan.R), found.row, -NOTHING)
    delta = _sort(plan, delta.reshape(-1, plan.R), found.row)
    dq, d_keys = kernels.backward(plan, q, do, lse, delta, found, k, v)
    dq = _unsorted(plan, dq)
    some = found.slot < found.row.size
    dq = sum(_choice(dq, found.slot[:, n], some[:, n]) for n in range(plan.N))
    carry = tuple(a + b for a, b in zip(carry, d_keys, strict=True))
    return carry, (dq * plan.scale).astype(q.dtype)


def _scan(plan: Plan, step, carry, xs):
    """Go through the queries [B, L, ...] by chunks."""
    xs = [rows.in_chunks(x, plan.chunk, fill) for x, fill in xs]
    if xs[0].shape[0] == 1:  # no loop to compile
        carry, out = step(carry, [x[0] for x in xs])
        return carry, jax.tree.map(lambda x: x[None], out)
    return lax.scan(step, carry, xs)


def _queries(plan: Plan, x):
    """Return results [chunks, chunk x G, R, ...] by query: [B, L, H, ...]."""
    rest = x.shape[3:]
    x = x.reshape(-1, plan.H, *rest)
    return x[:plan.B * plan.L].reshape(plan.B, plan.L, plan.H, *rest)


def _forward(kernels: Kernels, plan: Plan, q, k, v, blocks, starts):
    step = functools.partial(_forward_chunk, kernels, plan, _by_block(plan, k, starts),
                             _by_block(plan, v, starts))
    _, (o, lse) = _scan(plan, step, None, [(q, 0), (_groups(plan, blocks), plan.groups)])
    return _queries(plan, o), _queries(plan, lse)


def _by_key(plan: Plan, gradients, blocks, starts):
    """Return gradients [E, block, D] of groups by key: [B, S, K, D].

    Which block a key belongs to is found among the chosen ones, which do not overlap: starts of
    blocks that nobody can choose may be anything.
    """
    B, S, K, M, block = plan.B, plan.S, plan.K, plan.M, plan.block
    chosen = tiles.distinct(blocks, M)
    chosen = jnp.where(chosen < 0, M, chosen)
    chosen = chosen.reshape(B, plan.L, K, -1).transpose(0, 2, 1, 3).reshape(B * K, -1)
    lane = jnp.arange(B * K, dtype=jnp.int32)[:, None]
    some = jnp.zeros((B * K, M + 1), bool).at[lane, chosen].set(True)[:, :M].reshape(B, K, M)
    start = jnp.clip(starts.astype(jnp.int32), 0, S - block)
    number = jnp.where(some, jnp.arange(M, dtype=jnp.int32)[None, None], -1)
    # the number of the block that starts at a key, from there on for `block` keys
    at = jnp.broadcast_to(start[:, None], (B, K, M))
    b, h = (jnp.arange(n, dtype=jnp.int32) for n in (B, K))
    begins = jnp.full((B, K, S), -1, jnp.int32).at[b[:, None, None], h[None, :, None], at].max(
        number)
    key = jnp.arange(S, dtype=jnp.int32)
    place = jnp.where(begins >= 0, key[None, None], -block)
    place = lax.cummax(place, axis=2)  # where the last chosen block before each key starts
    offset = key[None, None] - place
    inside = offset < block
    own = jnp.take_along_axis(begins, jnp.maximum(place, 0), axis=2)
    lane = b[:, None, None] * K + h[None, :, None]
    row = jnp.where(inside, (lane * M + own) * block + offset, 0)
    for_keys = []
    for x in gradients:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat.at[row].get(mode="promise_in_bounds")
        flat = jnp.where(inside[..., None], flat, 0)
        for_keys.append(flat.transpose(0, 2, 1, 3))
    return for_keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, plan, q, k, v, blocks, starts):
    return _forward(kernels, plan, q, k, v, blocks, starts)


def _attend_forward(kernels, plan, q, k, v, blocks, starts):
    o, lse = _forward(kernels, plan, q, k, v, blocks, starts)
    return (o, lse), (q, k, v, blocks, starts, o, lse)


def _attend_backward(kernels, plan, kept, cotangents):
    q, k, v, blocks, starts, o, lse = kept
    do, d_lse = cotangents
    delta = (do.astype(_F32) * o.astype(_F32)).sum(-1) - d_lse
    step = functools.partial(_backward_chunk, kernels, plan, _by_block(plan, k, starts),
                             _by_block(plan, v, starts))
    carry = tuple(jnp.zeros((plan.groups, plan.block, D), _F32) for D in (plan.Dk, plan.Dv))
    (dk, dv), dq = _scan(plan, step, carry, [
        (q, 0), (do, 0), (lse, -NOTHING), (delta, 0),
        (_groups(plan, blocks), plan.groups)])
    dk, dv = _by_key(plan, (dk * plan.scale, dv), blocks, starts)
    return _queries(plan, dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(kernels: Kernels, plan: Plan, q, k, v, blocks, starts):
    """Return (o [B, L, H, Dv], lse [B, L, H]) of block_sparse, with gradients, tile by tile."""
    if 0 in (plan.B, plan.L, plan.N, plan.M) or plan.S < plan.block:
        return (jnp.zeros((plan.B, plan.L, plan.H, plan.Dv), q.dtype),
                jnp.full((plan.B, plan.L, plan.H), NOTHING, _F32))
    return _attend(kernels, plan, q, k, v, blocks, starts)
