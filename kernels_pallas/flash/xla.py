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

from kernels_pallas.flash import looped, pairs, unrolled, visits
from kernels_pallas.rounding import narrow

# Query blocks up to this many are unrolled.
UNROLL = 4
# Queries of a block: a quarter of the row, between these. Measured forward and backward on a busy
# machine (bfloat16, head 64), milliseconds of processor time by block:
#   16 rows of  256, 4 heads:      64: 25, 128: 24, 256: 27, and autodiff of dense attention: 172
#    8 rows of  512, 4 heads:      64: 76, 128: 43, 256: 47, 512: 60
#    1 row  of 4096, 8 heads on 2: 128: 406, 256: 374, 512: 361
SMALLEST, LARGEST = 128, 512
# Windows shorter than this take smaller blocks: what a block holds beside the window is wasted.
# Measured as above, 1 row of 8192, 4 heads on 1, by queries x keys of a block:
#   window 128: 128 x 128: 36, 256 x 128: 31, 256 x 256: 35, 512 x 512: 64, and without window: 233
#   window 512: 128 x 128: 74, 256 x 128: 53, 256 x 256: 49, 512 x 512: 65
SHORT = 1024


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


def _forward(plan, q, k, v, marks, sinks):
    """Return o [B, L, H, Dv] and lse [B, K, G, L]."""
    keys = (_keys_first(k), _keys_first(v))
    if not _few(plan) or marks.first is not None:
        return looped.forward(plan, q, *keys, marks, sinks)
    o, lse = unrolled.forward(plan, _heads_first(q, k.shape[2]), *keys, marks, sinks)
    return _heads_back(o), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, marks, sinks):
    return _forward(plan, q, k, v, marks, sinks)


def _attend_forward(plan, q, k, v, marks, sinks):
    o, lse = _forward(plan, q, k, v, marks, sinks)
    return (o, lse), (q, k, v, marks, sinks, o, lse)


def _attend_backward(plan, kept, gradients):
    do, d_lse = gradients
    # Without the barrier XLA sees that the scores were computed before and keeps them alive.
    (q, k, v, marks, sinks, o, lse), do = lax.optimization_barrier((kept, do))
    K, dtype = k.shape[2], lse.dtype
    delta_BxLxH = (do.astype(dtype) * o.astype(dtype)).sum(-1)
    # d score = weight (d weight - delta), and the gradient of lse by a score is the weight.
    delta = _heads_first(delta_BxLxH[..., None], K)[..., 0] - d_lse
    dq, dk, dv = _gradients(plan, q, k, v, do, marks, lse, delta, q.dtype)
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(dtype).reshape(1, K, -1, 1) - lse)
        d_sinks = -(weight * delta).sum((0, 3)).reshape(-1).astype(sinks.dtype)
    return dq, narrow(dk, k.dtype), narrow(dv, v.dtype), None, d_sinks


def _gradients(plan, q, k, v, do, marks, lse, delta, dtype):
    """Return dq in a dtype, dk and dv, wide, as their arguments lie; lse and delta [B, K, G, L]."""
    B, K, keys = q.shape[0], k.shape[2], (_keys_first(k), _keys_first(v))
    scale = np.asarray(plan.scale, lse.dtype)
    if not _few(plan) or marks.first is not None:
        dq, dk, dv = looped.backward(plan, q, *keys, do, marks, lse, delta, dtype)
    else:
        dq, dk, dv = unrolled.backward(plan, _heads_first(q, K), _heads_first_T(q, K), *keys,
                                       _heads_first(do, K), _heads_first_T(do, K), marks, lse,
                                       delta)
        dq = narrow(_heads_back(dq) * scale, dtype)
    return dq, _keys_back(dk, B) * scale, _keys_back(dv, B)


_attend.defvjp(_attend_forward, _attend_backward)


def _few(plan) -> bool:
    return plan.L <= UNROLL * plan.block_q


def _plan(L, S, *, scale=1.0, causal=True, window=None, softcap=None, stride=1, span=1,
          late=False, block_q=None, block_k=None):
    """Return the plan, with the blocks asked for or those that suit the lengths and the window."""
    short = window is not None and window < SHORT
    if block_q is None:
        block_q = min(max(-(-L // (UNROLL * 64)) * 64, SMALLEST), 256 if short else LARGEST)
    if block_k is None:
        # Never shorter than the queries', so that a row of few blocks needs no merging.
        block_k = LARGEST
        if short and L > UNROLL * block_q:
            block_k = 128 if window <= 128 * stride else 256
    offset = 0 if late or (stride, span) != (1, 1) else S - L
    return pairs.Plan(float(scale), causal, window, softcap, min(block_q, L), min(block_k, S), L,
                      S, stride, span, offset)


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
          causal=True, window=None, softcap=None, sinks_H=None, ends_BxS=None, stride=1, span=1,
          return_lse=False, block_q=None, block_k=None, first=None):
    """Attend block by block."""
    (B, L, H), S = q_BxLxHxDk.shape[:3], k_BxSxKxDk.shape[1]
    plan = _plan(L, S, scale=scale, causal=causal, window=window, softcap=softcap, stride=stride,
                 span=span, late=ends_BxS is not None, block_q=block_q, block_k=block_k)
    plan, marks = _marked(plan, segments_q, segments_k, ends_BxS, first)
    o, lse = _attend(plan, q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, marks, sinks_H)
    if not return_lse:
        return o
    lse_BxLxH = lse.reshape(B, H, L).transpose(0, 2, 1)
    unseen = jnp.full_like(lse_BxLxH, pairs.MASKED)
    return o, jnp.where(lse_BxLxH > -pairs.EMPTY, unseen, lse_BxLxH)


def _marked(plan, segments_q, segments_k, ends, first):
    """Return the plan and the marks that mask beside it."""
    if segments_k is not None:
        # Padding equals no query's segment, so that it sees nothing and is not seen.
        segments_k = jnp.where(segments_k == 0, jnp.full_like(segments_k, -1), segments_k)
    if first is not None:
        plan, first = plan._replace(offset=0), jnp.asarray(first, jnp.int32)
    return plan, pairs.Marks(segments_q, segments_k, ends, first)


def part_gradients(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, do_BxLxHxDv, lse_BxLxH, delta_BxLxH, *,
                   first=None, segments_q=None, segments_k=None, scale, causal=True, window=None,
                   softcap=None, ends_BxS=None, stride=1, span=1, block_q=None, block_k=None,
                   dtype=None):
    """Return dq, dk and dv of these keys' part in a softmax over these and others.

    Shapes: as of `flash`; lse is of all keys, -1e30 for a row that sees none, and delta
        sum(do * o) over the width less the gradient of lse, both in the dtype of lse, as are
        the gradients: sums of parts are not rounded before they are added. `dtype` is dq's,
        where that takes too much memory.
    """
    L, (S, K) = q_BxLxHxDk.shape[1], k_BxSxKxDk.shape[1:3]
    plan = _plan(L, S, scale=scale, causal=causal, window=window, softcap=softcap,
                 stride=stride, span=span, late=ends_BxS is not None, block_q=block_q,
                 block_k=block_k)
    plan, marks = _marked(plan, segments_q, segments_k, ends_BxS, first)
    # a row that sees nothing has weights exp(score - 1e30) = 0, as in `pairs.finish`
    unseen = jnp.full_like(lse_BxLxH, -pairs.MASKED)
    lse = jnp.where(lse_BxLxH <= pairs.EMPTY, unseen, lse_BxLxH)
    lse, delta = (_heads_first(x[..., None], K)[..., 0] for x in (lse, delta_BxLxH))
    return _gradients(plan, q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, do_BxLxHxDv, marks, lse, delta,
                      lse.dtype if dtype is None else dtype)


def keys_per_query(length, *, keys=None, window=None, stride=1, span=1):
    """Keys that a query is multiplied with, on average, in causal self-attention of this length.

    Units: tokens, masked positions and padding inside blocks included: what is executed, in the
    forward pass and again in the backward. `keys` [S], `length` when None.
    """
    keys = length if keys is None else keys
    if not keys:
        return 0.0
    plan = _plan(length, keys, window=window, stride=stride, span=span)
    return visits.pairs_executed(plan, _few(plan)) / length
