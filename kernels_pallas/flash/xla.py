"""Attention in linear memory for any platform, with its own backward pass.

Queries and keys are cut in blocks; only o and the logarithm of the softmax's denominator are
kept, and the backward pass computes the scores of a block again. Block pairs that no query sees
by position are never computed. Few query blocks are unrolled, so a short row costs no loop; many
become a scan over query blocks with a bounded loop over key blocks. Letters as in pairs.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.flash import pairs
from kernels_pallas.rounding import narrow

# Query blocks up to this many are unrolled.
UNROLL = 4
# Queries of a block: a quarter of the row, between these. Measured forward and backward on a busy
# machine (bfloat16, head 64), milliseconds of processor time by block:
#   16 rows of  256, 4 heads:      64: 25, 128: 24, 256: 27, and autodiff of dense attention: 172
#    8 rows of  512, 4 heads:      64: 76, 128: 43, 256: 47, 512: 60
#    1 row  of 4096, 8 heads on 2: 128: 406, 256: 374, 512: 361
SMALLEST, LARGEST = 128, 512


# Layouts. Heads lead: queries [B, K, G, L, D] and [B, K, G, D, L], keys [N, S, D].


def _heads_first(x_BxLxHxD, K):
    B, L, H, D = x_BxLxHxD.shape
    return x_BxLxHxD.reshape(B, L, K, H // K, D).transpose(0, 2, 3, 1, 4)


def _heads_first_T(x_BxLxHxD, K):
    """[B, K, D, G, L]: the rows of one key head, transposed."""
    B, L, H, D = x_BxLxHxD.shape
    return x_BxLxHxD.reshape(B, L, K, H // K, D).transpose(0, 2, 4, 3, 1)


def _keys_first(x_BxSxKxD):
    B, S, K, D = x_BxSxKxD.shape
    return x_BxSxKxD.transpose(0, 2, 1, 3).reshape(B * K, S, D)


def _heads_back(x_BxKxGxLxD):
    B, K, G, L, D = x_BxKxGxLxD.shape
    return x_BxKxGxLxD.transpose(0, 3, 1, 2, 4).reshape(B, L, K * G, D)


def _keys_back(x_NxDxS, B):
    N, D, S = x_NxDxS.shape
    return x_NxDxS.reshape(B, N // B, D, S).transpose(0, 3, 1, 2)


# Unrolled: every start and size is a Python number.


def _keys(plan, start, stop):
    """Yield (start_k, stop_k, masked by position) for the queries [start, stop)."""
    low, high = 0, plan.S
    if plan.causal:
        high = min(plan.S, stop + plan.offset)
    if plan.window is not None:
        low = max(0, start + plan.offset - plan.window + 1) // 64 * 64  # keep rows aligned
    for a in range(low, high, plan.block_k):
        b = min(a + plan.block_k, high)
        masked = plan.causal and b - 1 > start + plan.offset
        masked |= plan.window is not None and stop - 1 + plan.offset - a >= plan.window
        yield a, b, masked


def _unrolled_bias(plan, q, k, masked, segments_q, segments_k, dtype):
    if segments_q is None and not masked:
        return None
    cut_q = None if segments_q is None else segments_q[:, slice(*q)]
    cut_k = None if segments_k is None else segments_k[:, slice(*k)]
    return pairs.bias_of(plan, q[0], k[0], q[1] - q[0], k[1] - k[0], cut_q, cut_k, dtype)


def _forward_unrolled(plan, q, k, v, segments_q, segments_k, sinks):
    B, K, G = q.shape[:3]
    dtype = pairs.wide(q.dtype)
    done = []
    for a in range(0, plan.L, plan.block_q):
        b = min(a + plan.block_q, plan.L)
        keys = list(_keys(plan, a, b))
        # Nothing to merge with: the first pair starts the softmax.
        state = None
        if sinks is not None or not keys:
            state = pairs.start(sinks, B, K, G, b - a, v.shape[-1], dtype)
        for c, d, masked in keys:
            bias = _unrolled_bias(plan, (a, b), (c, d), masked, segments_q, segments_k, dtype)
            state = pairs.add_pair(plan, q[:, :, :, a:b], k[:, c:d], v[:, c:d], bias, state)
        done.append(pairs.finish(state, v.dtype))
    o, lse = zip(*done, strict=True)
    return jnp.concatenate(o, 3), jnp.concatenate(lse, 3)


def _add_keys(total, part, start, stop, S):
    """Add part to the keys [start, stop) of total, which is None before the first."""
    widths = ((0, 0), (0, 0), (start, S - stop))
    part = jnp.pad(part, widths) if start or stop < S else part
    return part if total is None else total + part


def _backward_unrolled(plan, q, q_T, k, v, do, do_T, segments_q, segments_k, lse, delta):
    B, K, G = q.shape[:3]
    N, dtype = B * K, lse.dtype
    dk, dv, done = None, None, []
    for a in range(0, plan.L, plan.block_q):
        b = min(a + plan.block_q, plan.L)
        rows = [x[:, :, :, a:b].reshape(N, G * (b - a), -1) for x in (q, do)]
        rows_T = [x[..., a:b].reshape(N, -1, G * (b - a)) for x in (q_T, do_T)]
        dq = None
        for c, d, masked in _keys(plan, a, b):
            bias = _unrolled_bias(plan, (a, b), (c, d), masked, segments_q, segments_k, dtype)
            parts = pairs.pair_gradients(plan, rows[0], rows_T[0], k[:, c:d], v[:, c:d], rows[1],
                                    rows_T[1], bias, lse[..., a:b], delta[..., a:b])
            dq = parts[0] if dq is None else dq + parts[0]
            dk = _add_keys(dk, parts[1], c, d, plan.S)
            dv = _add_keys(dv, parts[2], c, d, plan.S)
        if dq is None:
            dq = jnp.zeros((N, G * (b - a), q.shape[-1]), dtype)
        done.append(dq.reshape(B, K, G, b - a, -1))
    if dk is None:
        dk = jnp.zeros((N, k.shape[-1], plan.S), dtype)
        dv = jnp.zeros((N, v.shape[-1], plan.S), dtype)
    return jnp.concatenate(done, 3), dk, dv


# Looped: rows padded to whole blocks, a scan over query blocks, loops over key blocks.


def _pad(x, dim, size):
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % size)
    return jnp.pad(x, widths)


def _ranges(plan, i, segmented):
    """Return (first, stop, masked) of key blocks for query block i: edge, inside, edge."""
    Q, U = plan.block_q, plan.block_k
    blocks = -(-plan.S // U)
    whole = plan.S // U  # blocks without padding
    first_q = i * Q + plan.offset
    last_q = first_q + Q - 1
    low, high, inside_low, inside_high = 0, blocks, 0, whole
    if plan.causal:
        high = jnp.clip(last_q // U + 1, 0, blocks)
        inside_high = jnp.clip((first_q + 1) // U, 0, whole)
    if plan.window is not None:
        low = jnp.clip((first_q - plan.window + 1) // U, 0, high)
        inside_low = jnp.clip(-((plan.window - 1 - last_q) // U), low, high)
    if segmented:
        return ((low, high, True),)
    inside_high = jnp.maximum(inside_high, inside_low)
    return (low, inside_low, True), (inside_low, inside_high, False), (inside_high, high, True)


def _looped_bias(plan, i, j, masked, segments_q, segments_k, dtype):
    if not masked:
        return None
    cut_k = None if segments_k is None else _cut(segments_k, j, plan.block_k)
    return pairs.bias_of(plan, i * plan.block_q, j * plan.block_k, plan.block_q, plan.block_k,
                 segments_q, cut_k, dtype)


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


def _forward_looped(plan, q, k, v, segments_q, segments_k, sinks):
    B, K, G = q.shape[:3]
    dtype = pairs.wide(q.dtype)
    segmented = segments_q is not None
    k, v = _pad(k, 1, plan.block_k), _pad(v, 1, plan.block_k)
    segments_k = _pad(segments_k, 1, plan.block_k) if segmented else None

    def block(x):
        i, q, segments_q = x

        def body(j, state, masked):
            bias = _looped_bias(plan, i, j, masked, segments_q, segments_k, dtype)
            keys, values = _cut(k, j, plan.block_k), _cut(v, j, plan.block_k)
            return pairs.add_pair(plan, q, keys, values, bias, state)

        state = pairs.start(sinks, B, K, G, plan.block_q, v.shape[-1], dtype)
        for first, stop, masked in _ranges(plan, i, segmented):
            state = lax.fori_loop(first, stop, functools.partial(body, masked=masked), state)
        return pairs.finish(state, v.dtype)

    q = _in_blocks(q, 3, plan.block_q)
    segments_q = _in_blocks(segments_q, 1, plan.block_q) if segmented else None
    o, lse = lax.map(block, (lax.iota(jnp.int32, len(q)), q, segments_q))
    return _out_of_blocks(o, 3, plan.L), _out_of_blocks(lse, 3, plan.L)


def _backward_looped(plan, q, q_T, k, v, do, do_T, segments_q, segments_k, lse, delta):
    B, K, G = q.shape[:3]
    N, R, dtype = B * K, G * plan.block_q, lse.dtype
    segmented = segments_q is not None
    k, v = _pad(k, 1, plan.block_k), _pad(v, 1, plan.block_k)
    segments_k = _pad(segments_k, 1, plan.block_k) if segmented else None

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
            bias = _looped_bias(plan, i, j, masked, segments_q, segments_k, dtype)
            parts = pairs.pair_gradients(plan, q, q_T, _cut(k, j, plan.block_k),
                                    _cut(v, j, plan.block_k), do, do_T, bias, lse, delta)
            return dq + parts[0], add(dk, parts[1], j), add(dv, parts[2], j)

        state = (jnp.zeros(q.shape, dtype), *carry)
        for first, stop, masked in _ranges(plan, i, segmented):
            state = lax.fori_loop(first, stop, functools.partial(body, masked=masked), state)
        return state[1:], state[0].reshape(B, K, G, plan.block_q, -1)

    cut = functools.partial(_in_blocks, size=plan.block_q)
    segments_q = cut(segments_q, 1) if segmented else None
    q, do, lse, delta = (cut(x, 3) for x in (q, do, lse, delta))
    xs = (lax.iota(jnp.int32, len(q)), q, cut(q_T, 4), do, cut(do_T, 4), segments_q, lse, delta)
    zeros = (jnp.zeros((N, k.shape[2], k.shape[1]), dtype),
             jnp.zeros((N, v.shape[2], v.shape[1]), dtype))
    (dk, dv), dq = lax.scan(block, zeros, xs)
    return _out_of_blocks(dq, 3, plan.L), dk[..., :plan.S], dv[..., :plan.S]


def _forward(plan, q, k, v, segments_q, segments_k, sinks):
    """Return o [B, L, H, Dv] and lse [B, K, G, L]."""
    K = k.shape[2]
    run = _forward_unrolled if plan.L <= UNROLL * plan.block_q else _forward_looped
    o, lse = run(plan, _heads_first(q, K), _keys_first(k), _keys_first(v), segments_q, segments_k,
                 sinks)
    return _heads_back(o), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, segments_q, segments_k, sinks):
    return _forward(plan, q, k, v, segments_q, segments_k, sinks)[0]


def _attend_forward(plan, q, k, v, segments_q, segments_k, sinks):
    o, lse = _forward(plan, q, k, v, segments_q, segments_k, sinks)
    return o, (q, k, v, segments_q, segments_k, sinks, o, lse)


def _attend_backward(plan, kept, do):
    # Without the barrier XLA sees that the scores were computed before and keeps them alive.
    (q, k, v, segments_q, segments_k, sinks, o, lse), do = lax.optimization_barrier((kept, do))
    B, K = q.shape[0], k.shape[2]
    dtype = lse.dtype
    delta_BxLxH = (do.astype(dtype) * o.astype(dtype)).sum(-1)
    delta = _heads_first(delta_BxLxH[..., None], K)[..., 0]
    run = _backward_unrolled if plan.L <= UNROLL * plan.block_q else _backward_looped
    dq, dk, dv = run(plan, _heads_first(q, K), _heads_first_T(q, K), _keys_first(k),
                     _keys_first(v), _heads_first(do, K), _heads_first_T(do, K), segments_q,
                     segments_k, lse, delta)
    scale = np.asarray(plan.scale, dtype)
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(dtype).reshape(1, K, -1, 1) - lse)
        d_sinks = -(weight * delta).sum((0, 3)).reshape(-1).astype(sinks.dtype)
    return (narrow(_heads_back(dq) * scale, q.dtype), narrow(_keys_back(dk, B) * scale, k.dtype),
            narrow(_keys_back(dv, B), v.dtype), None, None, d_sinks)


_attend.defvjp(_attend_forward, _attend_backward)


def _block(length, asked):
    """Return the block asked for, or the one for this length."""
    if asked is None:
        asked = min(max(-(-length // (UNROLL * 64)) * 64, SMALLEST), LARGEST)
    return min(asked, length)


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
          causal=True, window=None, softcap=None, sinks_H=None, block_q=None, block_k=None):
    """Attend block by block."""
    L, S = q_BxLxHxDk.shape[1], k_BxSxKxDk.shape[1]
    # A key block is never shorter than the queries', so a row of few blocks needs no merging.
    plan = pairs.Plan(float(scale), causal, window, softcap, _block(L, block_q),
                 min(block_k or LARGEST, S), L, S)
    if segments_k is not None:
        # Padding equals no query's segment, so that it sees nothing and is not seen.
        segments_k = jnp.where(segments_k == 0, jnp.full_like(segments_k, -1), segments_k)
    return _attend(plan, q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, segments_q, segments_k, sinks_H)


def keys_per_query(length):
    """Keys that a query is multiplied with, on average, in causal self-attention of this length.

    Units: tokens, masked positions and padding inside blocks included: what is executed, in the
    forward pass and again in the backward.
    """
    block_q, block_k = _block(length, None), min(LARGEST, length)
    starts = range(0, length, block_q)
    if len(starts) <= UNROLL:
        work = sum((min(a + block_q, length) - a) * min(a + block_q, length) for a in starts)
    else:
        work = sum(block_q * -(-min(a + block_q, length) // block_k) * block_k for a in starts)
    return work / length
