"""One pair of blocks of attention: add it to a softmax, and its gradients.

Letters beside the house's: N = B x K rows of the batched products, G = H / K query heads per key
head, Q queries and U keys of a block, R = G x Q rows of one product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.rounding import narrow

# A masked score. Finite, so that no difference of two is nan; a row whose largest score is under
# EMPTY sees nothing.
MASKED, EMPTY = -1e30, -1e29


class Plan(NamedTuple):
    """All that is known when tracing."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    block_q: int
    block_k: int
    L: int
    S: int
    stride: int = 1
    span: int = 1
    offset: int = 0  # row of query 0


class Marks(NamedTuple):
    """What masks beside positions, each None or int: segments [B, L] and [B, S], ends [B, S].

    `first` [] is added to the plan's offset: the part of it that is not known when tracing.
    """

    segments_q: Any = None
    segments_k: Any = None
    ends: Any = None
    first: Any = None

    @property
    def any(self) -> bool:
        """Whether a block may be masked that no position masks."""
        return self.segments_q is not None or self.ends is not None


def wide(dtype):
    """Return the dtype of scores and sums: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# The products. XLA:CPU (jax 0.12) runs a batched bfloat16 product on the matrix units only when
# the left operand is contracted over its last dim; others become float32 loops, or wait for a
# transposed copy of the big operand. So everything contracted over queries is written with the
# small operand transposed, on the left. Measured at N=64, 256 x 256, head 64, one core, GFLOP/s:
#   scores nrd,nud->nru              350     dv nru,nrd->nud (what autodiff writes)      40
#   output nru,nud->nrd              530     dv with rows split in two                  220
#   dq     nru,nud->nrd              530     dv ndr,nru->ndu, do transposed             540
def _rows_by_keys(a_NxRxD, b_NxUxD, dtype):
    return jnp.einsum("nrd,nud->nru", a_NxRxD, b_NxUxD, preferred_element_type=dtype)


def _weigh_keys(w_NxRxU, b_NxUxD, dtype):
    return jnp.einsum("nru,nud->nrd", w_NxRxU, b_NxUxD, preferred_element_type=dtype)


def _weigh_rows(a_NxDxR, w_NxRxU, dtype):
    return jnp.einsum("ndr,nru->ndu", a_NxDxR, w_NxRxU, preferred_element_type=dtype)


def bias_of(plan, start_q, start_k, size_q, size_k, marks, dtype):
    """0 where seen and MASKED elsewhere, [B or 1, 1, 1, size_q, size_k]; marks cut to the blocks.

    The barrier keeps it one array that the heads share: fused into its users it is computed for
    every head, and costs more than the exponential.
    """
    position_Q = start_q + plan.offset + lax.iota(jnp.int32, size_q)
    if marks.first is not None:
        position_Q = position_Q + marks.first
    key_U = start_k + lax.iota(jnp.int32, size_k)
    ends_BxU = (key_U * plan.stride + (plan.span - 1))[None] if marks.ends is None else marks.ends
    behind_BxQxU = position_Q[None, :, None] - ends_BxU[:, None, :]
    seen_BxQxU = jnp.broadcast_to((key_U < plan.S)[None, None, :], behind_BxQxU.shape)
    if plan.causal:
        seen_BxQxU &= behind_BxQxU >= 0
    if plan.window is not None:
        seen_BxQxU &= behind_BxQxU < plan.window
    if marks.segments_q is not None:
        same_BxQxU = marks.segments_q[:, :, None] == marks.segments_k[:, None, :]
        shape = jnp.broadcast_shapes(seen_BxQxU.shape, same_BxQxU.shape)
        seen_BxQxU = jnp.broadcast_to(seen_BxQxU, shape) & same_BxQxU
    zero, masked = jnp.zeros((), dtype), jnp.full((), MASKED, dtype)
    bias_BxQxU = lax.optimization_barrier(jnp.where(seen_BxQxU, zero, masked))
    return bias_BxQxU[:, None, None]


def _scores(plan, raw, bias):
    """Scale, cap and mask; [B, K, G, Q, U]."""
    scores = raw * np.asarray(plan.scale, raw.dtype)
    if plan.softcap is not None:
        cap = np.asarray(plan.softcap, raw.dtype)
        scores = jnp.tanh(scores / cap) * cap
    return scores if bias is None else scores + bias


def add_pair(plan, q, k, v, bias, state):
    """Add one pair of blocks to the softmax; q [B, K, G, Q, Dk], k and v [N, U, D].

    state is (top, total, sum): largest score and denominator [B, K, G, Q], numerator
    [B, K, G, Q, Dv]; None before the first pair when there are no sinks.
    """
    dtype = wide(q.dtype)
    B, K, G, Q = q.shape[:4]
    raw = _rows_by_keys(q.reshape(B * K, G * Q, -1), k, dtype).reshape(B, K, G, Q, -1)
    scores = _scores(plan, raw, bias)
    floor = np.asarray(EMPTY, dtype) if state is None else state[0]
    top = jnp.maximum(scores.max(-1), floor)
    weights = narrow(jnp.exp(scores - top[..., None]), v.dtype)
    # One array for the sum and the product, or the exponential is computed for each.
    weights = lax.optimization_barrier(weights)
    total = weights.astype(dtype).sum(-1)
    summed = _weigh_keys(weights.reshape(B * K, G * Q, -1), v, dtype).reshape(B, K, G, Q, -1)
    if state is not None:
        shrink = jnp.exp(state[0] - top)
        total += state[1] * shrink
        summed += state[2] * shrink[..., None]
    return top, total, summed


def finish(state, dtype):
    """Return o [B, K, G, Q, Dv] and the logarithm of the denominator [B, K, G, Q]."""
    top, total, summed = state
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    # A row that sees nothing: its weights in the backward pass are exp(score - 1e30) = 0.
    lse = jnp.where(empty, jnp.full_like(top, -MASKED), top + jnp.log(total))
    return narrow(summed / total[..., None], dtype), lse


def start(sinks, B, K, G, Q, Dv, dtype):
    """Return the softmax before any key: of the sinks alone, or of nothing."""
    if sinks is None:
        top, total = jnp.full((B, K, G, Q), EMPTY, dtype), jnp.zeros((B, K, G, Q), dtype)
    else:
        top = jnp.broadcast_to(sinks.astype(dtype).reshape(1, K, G, 1), (B, K, G, Q))
        total = jnp.ones((B, K, G, Q), dtype)
    return top, total, jnp.zeros((B, K, G, Q, Dv), dtype)


def pair_gradients(plan, q, q_T, k, v, do, do_T, bias, lse, delta):
    """Return dq [N, R, Dk], dk [N, Dk, U], dv [N, Dv, U] of one pair; dq and dk before scale."""
    dtype = lse.dtype
    B, K, G, Q = lse.shape
    N, R = B * K, G * Q
    raw = _rows_by_keys(q, k, dtype).reshape(B, K, G, Q, -1)
    scores = _scores(plan, raw, bias)
    weights = lax.optimization_barrier(narrow(jnp.exp(scores - lse[..., None]), v.dtype))
    d_weights = _rows_by_keys(do, v, dtype).reshape(B, K, G, Q, -1)
    d_scores = weights.astype(dtype) * (d_weights - delta[..., None])
    if plan.softcap is not None:
        bent = jnp.tanh(raw * np.asarray(plan.scale / plan.softcap, dtype))
        d_scores *= 1 - bent * bent
    d_scores = lax.optimization_barrier(narrow(d_scores, k.dtype)).reshape(N, R, -1)
    dv = _weigh_rows(do_T, weights.reshape(N, R, -1), dtype)
    return _weigh_keys(d_scores, k, dtype), _weigh_rows(q_T, d_scores, dtype), dv
