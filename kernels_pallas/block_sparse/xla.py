"""Attention to chosen blocks for any platform, with its own backward pass.

Queries go by chunks. A chunk's choices are sorted by block (tiles.py) and computed as batched
products of a tile of query rows with a block; the partial results of a query's choices are then
merged by the logarithms of their denominators. Only o and lse are kept; the backward pass builds
the tiles and the scores again. Letters as in tiles.py; U keys of a block, X = T x R rows of a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import rows
from kernels_pallas.block_sparse import tiles
from kernels_pallas.rounding import narrow

# A row that sees nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = -1e30, -1e29
# Query rows (one head of one pair) of a tile, of a group on average, and of a chunk at least.
TILE, GROUP, CHUNK = 256, 1024, 1 << 16
# Scores that one step of the loop over tiles computes. Measured forward and backward, one row of
# 4096, 4 heads of 64 on 1, a machine with AMX (jax 0.12), milliseconds with one and two threads:
#   7 blocks of 64 for all heads: 1 << 16: 81 and 80, 18: 96 and 74, 19: 105 and 74, 20: 123 and 71
#   3 blocks of 256 for each:     1 << 16: 62 and 78, 18: 79 and 69, 19: 84 and 62, 20: 87 and 61
SCORES = 1 << 19


class Plan(NamedTuple):
    """All that is known when tracing: sizes, and how they are cut."""

    scale: float
    block: int
    B: int
    L: int
    H: int
    K: int
    G: int
    N: int
    M: int
    batch: int  # rows of the batch in one chunk
    chunk: int  # queries of each of them
    size: int  # pairs of a tile
    at_once: int  # tiles of one step

    @property
    def groups(self) -> int:
        """Groups of a chunk."""
        return self.batch * self.K * self.M

    @property
    def rows(self) -> int:
        """Query rows of a chunk, each with N choices and H // G heads."""
        return self.batch * self.chunk * self.G

    @property
    def tiles(self) -> int:
        """Tiles of a chunk at most, whole steps of them."""
        bound = tiles.bound(self.rows * self.N, self.groups, self.size)
        return -(-bound // self.at_once) * self.at_once


def plan_of(scale, block, B, L, H, K, G, N, M):
    """Choose chunks and tiles for the sizes of a call."""
    heads = H // G
    chunk = max(CHUNK, GROUP * K * M) // (H * N)
    chunks = -(-L // max(chunk, 1))
    batch = 1
    if chunks == 1:
        batch = max(b for b in range(1, B + 1) if B % b == 0 and (b == 1 or b * L <= chunk))
    size = max(TILE // heads, 1)
    at_once = max(SCORES // (size * heads * block), 1)
    chunk = -(-L // chunks)
    bound = tiles.bound(batch * chunk * G * N, batch * K * M, size)
    return Plan(scale, block, B, L, H, K, G, N, M, batch, chunk, size, min(at_once, bound))


def keys_per_query(length, *, heads, kv_heads, groups, block, choices):
    """Keys that a query is multiplied with, on average, when each chooses of the blocks before it.

    Units: tokens, with the rows that fill up tiles, under even choices: what is executed.
    """
    M = length // block
    if not M or not choices:
        return 0.0
    plan = plan_of(1.0, block, 1, length, heads, kv_heads, groups, choices, M)
    pairs = sum(min(i // block, choices) for i in range(length)) * groups
    chunks = -(-length // plan.chunk)
    blocks = sum(min((c + 1) * plan.chunk, length) // block for c in range(chunks)) * kv_heads
    # a block's last tile is half full on average, and a step's tiles are computed together
    tiles_used = pairs / plan.size + blocks / 2 + chunks * (plan.at_once - 1) / 2
    return tiles_used * plan.size * (heads // groups) * block / (length * heads)


# Layouts. Chunks lead: what belongs to queries is [batches, chunks, rows, ...], keys by block are
# [batches, groups, U, D].


def _in_chunks(plan, x_BxLxY, fill=0):
    """[batches, chunks, batch * chunk, ...]."""
    B, L = x_BxLxY.shape[:2]
    rest = x_BxLxY.shape[2:]
    chunks = -(-L // plan.chunk)
    widths = ((0, 0), (0, chunks * plan.chunk - L), *((0, 0) for _ in rest))
    x = jnp.pad(x_BxLxY, widths, constant_values=fill)
    x = x.reshape(B // plan.batch, plan.batch, chunks, plan.chunk, *rest)
    return jnp.swapaxes(x, 1, 2)


def _out_of_chunks(plan, x):
    """Undo it, for [batches, chunks, rows, heads, ...]."""
    batches, chunks = x.shape[:2]
    rest = (plan.H, *x.shape[4:])
    x = x.reshape(batches, chunks, plan.batch, plan.chunk, *rest)
    x = jnp.swapaxes(x, 1, 2).reshape(plan.B, chunks * plan.chunk, *rest)
    return x[:, :plan.L]


def _rows(plan, x_BxLxHxD):
    """[batches, chunks, rows, heads * D]."""
    x = _in_chunks(plan, x_BxLxHxD)
    return x.reshape(*x.shape[:2], plan.rows, -1)


def _with_spare(x, fill=0):
    """A chunk's rows and one more, for slots without a pair."""
    return jnp.pad(x, ((0, 1), (0, 0)), constant_values=fill)


def _batches(body, xs):
    """`lax.map` of `body`, without a loop of one step: XLA copies what goes into such."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.map(body, xs)
    return jax.tree.map(lambda x: x[None], body(jax.tree.map(lambda x: x[0], xs)))


def _filled(shape, value, dtype, found):
    """A constant that XLA cannot know for one.

    A known one is made once for both passes, kept all the while and copied for every use.
    """
    value = jnp.where(found.used < 0, jnp.ones((), dtype), jnp.full((), value, dtype))
    return jnp.broadcast_to(value, shape)


def _groups(plan, blocks_BxLxGxN):
    """The group of every pair, plan.groups for none; [batches, chunks, rows, N]."""
    blocks = _in_chunks(plan, tiles.distinct(blocks_BxLxGxN, plan.M), -1)
    head = jnp.arange(plan.G, dtype=jnp.int32) // (plan.G // plan.K)
    lane = jnp.arange(plan.batch, dtype=jnp.int32)[:, None] * plan.K + head[None, :]
    group = lane.reshape(1, 1, plan.batch, 1, plan.G, 1) * plan.M + blocks
    group = jnp.where(blocks < 0, plan.groups, group)
    return group.reshape(*group.shape[:2], plan.rows, plan.N)


def _key_rows(plan, starts_BxM, S):
    rows = starts_BxM[:, :, None] + jnp.arange(plan.block, dtype=starts_BxM.dtype)[None, None]
    return jnp.clip(rows, 0, S - 1)


def _by_block(plan, x_BxSxKxD, starts_BxM):
    """[batches, groups, U, D]."""
    B, S, K, D = x_BxSxKxD.shape
    rows = _key_rows(plan, starts_BxM, S).reshape(B, -1)
    x = jnp.take_along_axis(x_BxSxKxD, rows[:, :, None, None], axis=1)
    x = x.reshape(B, plan.M, plan.block, K, D).transpose(0, 3, 1, 2, 4)
    return x.reshape(B // plan.batch, plan.groups, plan.block, D)


def _from_blocks(plan, x, starts_BxM, S):
    """Add [batches, groups, D, U] up to [B, S, K, D]."""
    D = x.shape[2]
    x = x.reshape(plan.B, plan.K, plan.M, D, plan.block).transpose(0, 2, 4, 1, 3)
    rows = _key_rows(plan, starts_BxM, S)
    row = jnp.arange(plan.B, dtype=rows.dtype)[:, None, None]
    return jnp.zeros((plan.B, S, plan.K, D), x.dtype).at[row, rows].add(x)


def _read(x, index):
    return x.at[index].get(mode="promise_in_bounds")


# The products, in the orders that XLA:CPU runs on the matrix units (flash/pairs.py).


def _rows_by_keys(a_ZxXxD, b_ZxUxD, dtype):
    return jnp.einsum("zxd,zud->zxu", a_ZxXxD, b_ZxUxD, preferred_element_type=dtype)


def _weigh_keys(w_ZxXxU, b_ZxUxD, dtype):
    return jnp.einsum("zxu,zud->zxd", w_ZxXxU, b_ZxUxD, preferred_element_type=dtype)


def _weigh_rows(a_ZxDxX, w_ZxXxU, dtype):
    return jnp.einsum("zdx,zxu->zdu", a_ZxDxX, w_ZxXxU, preferred_element_type=dtype)


def _tile_rows(plan, x, row_ZxT):
    """Read [Z, T * R, D] from rows [rows + 1, R * D]."""
    x = _read(x, row_ZxT)
    return x.reshape(row_ZxT.shape[0], -1, x.shape[-1] // (plan.H // plan.G))


def _each_choice(found, of):
    """Add up of(n, slot [rows]) over the N choices of every row."""
    total = None
    for n in range(found.slot.shape[1]):
        part = of(n, found.slot[:, n])
        total = part if total is None else total + part
    return total


def _step(found, plan, i):
    """The groups and the rows of the tiles of step i."""
    first = i * plan.at_once
    return (first * plan.size, lax.dynamic_slice_in_dim(found.group, first, plan.at_once),
            lax.dynamic_slice_in_dim(found.row, first, plan.at_once))


def _steps(found, plan):
    return (found.used + (plan.at_once - 1)) // plan.at_once


def _forward_chunk(plan, k, v, carry, x):
    q, group = x
    R, dtype = plan.H // plan.G, _wide(q.dtype)
    found = tiles.cut(group, plan.groups, plan.size, plan.at_once)
    q, slots = _with_spare(q), plan.tiles * plan.size + 1  # the last one stands for no choice
    parts = (_filled((slots, R * v.shape[-1]), 0, v.dtype, found),
             _filled((slots, R), NOTHING, dtype, found))

    def body(i, parts):
        first, group_Z, row_ZxT = _step(found, plan, i)
        raw = _rows_by_keys(_tile_rows(plan, q, row_ZxT), _read(k, group_Z), dtype)
        scores = raw * np.asarray(plan.scale, dtype)
        top = scores.max(-1)
        # One array for the sum and the product, or the exponential is computed for each.
        weights = lax.optimization_barrier(narrow(jnp.exp(scores - top[..., None]), v.dtype))
        total = weights.astype(dtype).sum(-1)
        o = _weigh_keys(weights, _read(v, group_Z), dtype) / total[..., None]
        o = narrow(o, v.dtype).reshape(plan.at_once * plan.size, -1)
        lse = (top + jnp.log(total)).reshape(plan.at_once * plan.size, R)
        return (lax.dynamic_update_slice_in_dim(parts[0], o, first, 0),
                lax.dynamic_update_slice_in_dim(parts[1], lse, first, 0))

    parts = o_parts, lse_parts = lax.fori_loop(0, _steps(found, plan), body, parts)
    lse_RowsxNxR = _read(lse_parts, found.slot)
    top = jnp.maximum(lse_RowsxNxR.max(1), np.asarray(EMPTY, dtype))
    weights = jnp.exp(lse_RowsxNxR - top[:, None])
    total = weights.sum(1)
    some = total > 0
    weights = lax.optimization_barrier(weights / jnp.where(some, total, 1)[:, None])
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), NOTHING)

    def weighed(n, slot):
        part = _read(o_parts, slot).reshape(plan.rows, R, -1).astype(dtype)
        return part * weights[:, n, :, None]

    return carry, (narrow(_each_choice(found, weighed), v.dtype), lse)


def _forward(plan, q, k, v, blocks, starts):
    k, v = _by_block(plan, k, starts), _by_block(plan, v, starts)

    def batch(x):
        q, k, v, group = x
        return lax.scan(functools.partial(_forward_chunk, plan, k, v), None, (q, group))[1]

    o, lse = _batches(batch, (_rows(plan, q), k, v, _groups(plan, blocks)))
    return _out_of_chunks(plan, o), _out_of_chunks(plan, lse)


def _backward_chunk(plan, k, v, carry, x):
    q, do, lse, delta, group = x
    dtype = _wide(q.dtype)
    found = tiles.cut(group, plan.groups, plan.size, plan.at_once)
    q, do, delta = (_with_spare(x) for x in (q, do, delta))
    lse = _with_spare(lse, -NOTHING)  # a slot without a pair weighs exp(0 - 1e30) = 0

    def body(i, state):
        dq, dk, dv = state
        _, group_Z, row_ZxT = _step(found, plan, i)
        q_Z, do_Z = (lax.optimization_barrier(_tile_rows(plan, x, row_ZxT)) for x in (q, do))
        lse_Z, delta_Z = (_read(x, row_ZxT).reshape(plan.at_once, -1) for x in (lse, delta))
        k_Z, v_Z = _read(k, group_Z), _read(v, group_Z)
        scores = _rows_by_keys(q_Z, k_Z, dtype) * np.asarray(plan.scale, dtype)
        weights = narrow(jnp.exp(scores - lse_Z[..., None]), v.dtype)
        weights = lax.optimization_barrier(weights)
        d_scores = _rows_by_keys(do_Z, v_Z, dtype) - delta_Z[..., None]
        d_scores = narrow(weights.astype(dtype) * d_scores, k.dtype)
        d_scores = lax.optimization_barrier(d_scores)
        part = _weigh_keys(d_scores, k_Z, dtype).reshape(*row_ZxT.shape, -1)
        dq = rows.add(dq, row_ZxT, part)
        # Barriers keep the transposes out of the products: XLA:CPU (jax 0.12) has no fast one that
        # contracts the first dim of the left side, and takes one core for it.
        q_T, do_T = (lax.optimization_barrier(jnp.swapaxes(x, 1, 2)) for x in (q_Z, do_Z))
        dk_Z = _weigh_rows(q_T, d_scores, dtype)
        dv_Z = _weigh_rows(do_T, weights, dtype)

        def add(z, state):
            return tuple(x.at[group_Z[z]].add(part[z], mode="promise_in_bounds")
                         for x, part in zip(state, (dk_Z, dv_Z), strict=True))

        return dq, *lax.fori_loop(0, plan.at_once, add, (dk, dv))

    dq = _filled(q.shape, 0, dtype, found)
    dq, dk, dv = lax.fori_loop(0, _steps(found, plan), body, (dq, *carry))
    dq = narrow(dq[:-1] * np.asarray(plan.scale, dtype), q.dtype)
    return (dk, dv), dq.reshape(plan.rows, plan.H // plan.G, -1)


def _backward(plan, q, k, v, blocks, starts, lse, delta, do):
    dtype, S = lse.dtype, k.shape[1]
    xs = (*(_rows(plan, x) for x in (q, do, lse, delta)), _groups(plan, blocks))

    def batch(x):
        k, v, xs = x
        zeros = tuple(jnp.zeros((plan.groups, a.shape[-1], plan.block), dtype) for a in (k, v))
        (dk, dv), dq = lax.scan(functools.partial(_backward_chunk, plan, k, v), zeros, xs)
        return dq, dk, dv

    keys = (_by_block(plan, k, starts), _by_block(plan, v, starts))
    dq, dk, dv = _batches(batch, (*keys, xs))
    dk = _from_blocks(plan, dk, starts, S) * np.asarray(plan.scale, dtype)
    return (_out_of_chunks(plan, dq), narrow(dk, k.dtype),
            narrow(_from_blocks(plan, dv, starts, S), v.dtype))


def _wide(dtype):
    """Return the dtype of scores and sums: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, blocks, starts):
    return _forward(plan, q, k, v, blocks, starts)


def _attend_forward(plan, q, k, v, blocks, starts):
    o, lse = _forward(plan, q, k, v, blocks, starts)
    return (o, lse), (q, k, v, blocks, starts, o, lse)


def _attend_backward(plan, kept, cotangents):
    # Without the barrier XLA sees that the tiles were built before and keeps them alive.
    (q, k, v, blocks, starts, o, lse), (do, d_lse) = lax.optimization_barrier((kept, cotangents))
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - d_lse
    dq, dk, dv = _backward(plan, q, k, v, blocks, starts, lse, delta, do)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _plan_of(q, k, blocks, starts, block, scale):
    (B, L, H), K, (G, N), M = q.shape[:3], k.shape[2], blocks.shape[2:], starts.shape[1]
    return None if 0 in (B, L, N, M) else plan_of(float(scale), block, B, L, H, K, G, N, M)


def block_sparse(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, *, block, scale,
                 return_lse=False):
    """Attend tile by tile."""
    B, L, H = q_BxLxHxDk.shape[:3]
    plan = _plan_of(q_BxLxHxDk, k_BxSxKxDk, blocks_BxLxGxN, starts_BxM, block, scale)
    if plan is None:
        o = jnp.zeros((B, L, H, v_BxSxKxDv.shape[-1]), v_BxSxKxDv.dtype)
        lse = jnp.full((B, L, H), NOTHING, _wide(o.dtype))
    else:
        o, lse = _attend(plan, q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM)
    return (o, lse) if return_lse else o


def part_gradients(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, do_BxLxHxDv,
                   lse_BxLxH, delta_BxLxH, *, block, scale):
    """Return dq, dk and dv of this part in a softmax over these blocks and other keys.

    Shapes: as of `block_sparse`; lse is of all keys, and delta sum(do * o) over the width less the
        gradient of lse.
    """
    q, k, v = q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv
    plan = _plan_of(q, k, blocks_BxLxGxN, starts_BxM, block, scale)
    if plan is None:
        return tuple(jnp.zeros_like(x) for x in (q, k, v))
    return _backward(plan, q, k, v, blocks_BxLxGxN, starts_BxM, lse_BxLxH, delta_BxLxH,
                     do_BxLxHxDv)
