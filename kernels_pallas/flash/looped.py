"""Many query blocks: a scan over them, with loops over key blocks. Letters as in pairs.py.

Rows are padded to whole blocks.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.flash import pairs, visits
from kernels_pallas.rounding import narrow


def _pad(x, dim, size):
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % size)
    return jnp.pad(x, widths)


class _Blocks:
    """The marks in whole blocks of keys, and what they say of a block."""

    def __init__(self, plan, marks):
        self.plan, self.marks, self.latest_M = plan, marks, None
        U = plan.block_k
        if marks.segments_k is not None:
            self.marks = self.marks._replace(segments_k=_pad(marks.segments_k, 1, U))
        if marks.ends is not None:
            self.marks = self.marks._replace(ends=_pad(marks.ends, 1, U))
            if plan.window is not None:
                self.latest_M = self.marks.ends.reshape(len(marks.ends), -1, U).max((0, 2))

    def ranges(self, i):
        start = 0 if self.marks.first is None else self.marks.first
        return visits.ranges(self.plan, i, self.marks.any, self.latest_M, start)

    def bias(self, i, j, masked, segments_q, dtype):
        if not masked:
            return None
        plan, U = self.plan, self.plan.block_k
        cut = pairs.Marks(segments_q, *(None if x is None else _cut(x, j, U)
                                        for x in (self.marks.segments_k, self.marks.ends)),
                         self.marks.first)
        return pairs.bias_of(plan, i * plan.block_q, j * U, plan.block_q, U, cut, dtype)


def _cut(x, j, size):
    return lax.dynamic_slice_in_dim(x, j * size, size, 1)


def _rows(x_BxLxY, i, size):
    """Block i of what belongs to queries, padded to whole blocks before."""
    return lax.dynamic_slice_in_dim(x_BxLxY, i * size, size, 1)


def _in_blocks(x, dim, size):
    """Cut dim in blocks and put them first."""
    x = _pad(x, dim, size)
    x = x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1:])
    return jnp.moveaxis(x, dim, 0)


def _out_of_blocks(x, dim, length):
    x = jnp.moveaxis(x, 0, dim)
    x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2:])
    return lax.slice_in_dim(x, 0, length, axis=dim)


def _heads_first(x_BxQxHxD, K):
    """[B, K, G, Q, D] of one block. Whole rows are never copied in another order."""
    B, Q, H, D = x_BxQxHxD.shape
    x = x_BxQxHxD.reshape(B, Q, K, H // K, D).transpose(0, 2, 3, 1, 4)
    return lax.optimization_barrier(x)


def _heads_back(x_BxKxGxQxD):
    B, K, G, Q, D = x_BxKxGxQxD.shape
    return x_BxKxGxQxD.transpose(0, 3, 1, 2, 4).reshape(B, Q, K * G, D)


def forward(plan, q, k, v, marks, sinks):
    """Return o [B, L, H, Dv] and lse [B, K, G, L]; q [B, L, H, Dk], k and v [N, S, D]."""
    (B, _, H, _), Q = q.shape, plan.block_q
    K, dtype = k.shape[0] // B, pairs.wide(q.dtype)
    blocks, segmented = _Blocks(plan, marks), marks.segments_q is not None
    k, v = _pad(k, 1, plan.block_k), _pad(v, 1, plan.block_k)
    q = _pad(q, 1, Q)
    segments = _pad(marks.segments_q, 1, Q) if segmented else None

    def block(i):
        here = _heads_first(_rows(q, i, Q), K)
        segments_q = _rows(segments, i, Q) if segmented else None

        def body(j, state, masked):
            bias = blocks.bias(i, j, masked, segments_q, dtype)
            keys, values = _cut(k, j, plan.block_k), _cut(v, j, plan.block_k)
            return pairs.add_pair(plan, here, keys, values, bias, state)

        state = pairs.start(sinks, B, K, H // K, Q, v.shape[-1], dtype)
        for first, stop, masked in blocks.ranges(i):
            state = lax.fori_loop(first, stop, functools.partial(body, masked=masked), state)
        o, lse = pairs.finish(state, v.dtype)
        return _heads_back(o), lse

    o, lse = lax.map(block, lax.iota(jnp.int32, q.shape[1] // Q))
    return _out_of_blocks(o, 1, plan.L), _out_of_blocks(lse, 3, plan.L)


def backward(plan, q, k, v, do, marks, lse, delta, dtype):
    """Return dq [B, L, H, Dk] in a dtype, dk [N, Dk, S] and dv [N, Dv, S]; dk before scale.

    q and do [B, L, H, D], lse and delta [B, K, G, L].
    """
    (B, _, H, _), Q, wide = q.shape, plan.block_q, lse.dtype
    N = k.shape[0]
    K, R = N // B, H * B // N * Q
    blocks, segmented = _Blocks(plan, marks), marks.segments_q is not None
    k, v = _pad(k, 1, plan.block_k), _pad(v, 1, plan.block_k)
    q, do = _pad(q, 1, Q), _pad(do, 1, Q)
    segments = _pad(marks.segments_q, 1, Q) if segmented else None
    scale = np.asarray(plan.scale, wide)

    def add(total, part, j):
        start = j * plan.block_k
        old = lax.dynamic_slice_in_dim(total, start, plan.block_k, 2)
        return lax.dynamic_update_slice_in_dim(total, old + part, start, 2)

    def block(carry, x):
        i, lse, delta = x
        q_i, do_i = (_heads_first(_rows(part, i, Q), K).reshape(N, R, -1) for part in (q, do))
        q_T, do_T = (lax.optimization_barrier(jnp.swapaxes(part, 1, 2)) for part in (q_i, do_i))
        segments_q = _rows(segments, i, Q) if segmented else None

        def body(j, state, masked):
            dq, dk, dv = state
            bias = blocks.bias(i, j, masked, segments_q, wide)
            parts = pairs.pair_gradients(plan, q_i, q_T, _cut(k, j, plan.block_k),
                                         _cut(v, j, plan.block_k), do_i, do_T, bias, lse, delta)
            return dq + parts[0], add(dk, parts[1], j), add(dv, parts[2], j)

        state = (jnp.zeros(q_i.shape, wide), *carry)
        for first, stop, masked in blocks.ranges(i):
            state = lax.fori_loop(first, stop, functools.partial(body, masked=masked), state)
        dq = narrow(state[0] * scale, dtype).reshape(B, K, -1, Q, q.shape[-1])
        return state[1:], _heads_back(dq)

    lse, delta = (_in_blocks(x, 3, Q) for x in (lse, delta))
    zeros = (jnp.zeros((N, k.shape[2], k.shape[1]), wide),
             jnp.zeros((N, v.shape[2], v.shape[1]), wide))
    (dk, dv), dq = lax.scan(block, zeros, (lax.iota(jnp.int32, len(lse)), lse, delta))
    return _out_of_blocks(dq, 1, plan.L), dk[..., :plan.S], dv[..., :plan.S]
