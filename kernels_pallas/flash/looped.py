"""Many query blocks: a scan over them, with loops over key blocks. Letters as in pairs.py.

Rows are padded to whole blocks.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from kernels_pallas.flash import pairs, visits


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


def _in_blocks(x, dim, size):
    """Cut dim in blocks and put them first."""
    x = _pad(x, dim, size)
    x = x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1:])
    return jnp.moveaxis(x, dim, 0)


def _out_of_blocks(x, dim, length):
    x = jnp.moveaxis(x, 0, dim)
    x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2:])
    return lax.slice_in_dim(x, 0, length, axis=dim)


def forward(plan, q, k, v, marks, sinks):
    """Return o [B, K, G, L, Dv] and lse [B, K, G, L]; k and v [N, S, D]."""
    B, K, G = q.shape[:3]
    dtype = pairs.wide(q.dtype)
    blocks, segmented = _Blocks(plan, marks), marks.segments_q is not None
    k, v = _pad(k, 1, plan.block_k), _pad(v, 1, plan.block_k)

    def block(x):
        i, q, segments_q = x

        def body(j, state, masked):
            bias = blocks.bias(i, j, masked, segments_q, dtype)
            keys, values = _cut(k, j, plan.block_k), _cut(v, j, plan.block_k)
            return pairs.add_pair(plan, q, keys, values, bias, state)

        state = pairs.start(sinks, B, K, G, plan.block_q, v.shape[-1], dtype)
        for first, stop, masked in blocks.ranges(i):
            state = lax.fori_loop(first, stop, functools.partial(body, masked=masked), state)
        return pairs.finish(state, v.dtype)

    q = _in_blocks(q, 3, plan.block_q)
    segments_q = _in_blocks(marks.segments_q, 1, plan.block_q) if segmented else None
    o, lse = lax.map(block, (lax.iota(jnp.int32, len(q)), q, segments_q))
    return _out_of_blocks(o, 3, plan.L), _out_of_blocks(lse, 3, plan.L)


def backward(plan, q, q_T, k, v, do, do_T, marks, lse, delta):
    """Return dq [B, K, G, L, Dk], dk [N, Dk, S], dv [N, Dv, S]; dq and dk before scale."""
    B, K, G = q.shape[:3]
    N, R, dtype = B * K, G * plan.block_q, lse.dtype
    blocks, segmented = _Blocks(plan, marks), marks.segments_q is not None
    k, v = _pad(k, 1, plan.block_k), _pad(v, 1, plan.block_k)

    def add(total, part, j):
        start = j * plan.block_k
        old = lax.dynamic_slice_in_dim(total, start, plan.block_k, 2)
        return lax.dynamic_update_slice_in_dim(total, old + part, start, 2)

    def block(carry, x):
        i, q, q_T, do, do_T, segments_q, lse, delta = x
        q, do = q.reshape(N, R, -1), do.reshape(N, R, -1)
        q_T, do_T = q_T.reshape(N, -1, R), do_T.reshape(N, -1, R)

        def body(j, state, masked):
            dq, dk, dv = state
            bias = blocks.bias(i, j, masked, segments_q, dtype)
            parts = pairs.pair_gradients(plan, q, q_T, _cut(k, j, plan.block_k),
                                         _cut(v, j, plan.block_k), do, do_T, bias, lse, delta)
            return dq + parts[0], add(dk, parts[1], j), add(dv, parts[2], j)

        state = (jnp.zeros(q.shape, dtype), *carry)
        for first, stop, masked in blocks.ranges(i):
            state = lax.fori_loop(first, stop, functools.partial(body, masked=masked), state)
        return state[1:], state[0].reshape(B, K, G, plan.block_q, -1)

    cut = functools.partial(_in_blocks, size=plan.block_q)
    segments_q = cut(marks.segments_q, 1) if segmented else None
    q, do, lse, delta = (cut(x, 3) for x in (q, do, lse, delta))
    xs = (lax.iota(jnp.int32, len(q)), q, cut(q_T, 4), do, cut(do_T, 4), segments_q, lse, delta)
    zeros = (jnp.zeros((N, k.shape[2], k.shape[1]), dtype),
             jnp.zeros((N, v.shape[2], v.shape[1]), dtype))
    (dk, dv), dq = lax.scan(block, zeros, xs)
    return _out_of_blocks(dq, 3, plan.L), dk[..., :plan.S], dv[..., :plan.S]
