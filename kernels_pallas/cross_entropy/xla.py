"""Cross-entropy in chunks of tokens for any platform; the logits never exist for all of them.

When differentiated, the gradients are made beside the loss, chunk by chunk, so that the logits are
computed once; the backward pass only multiplies them by the loss's own gradient.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import blocks, device
from kernels_pallas.rounding import narrow

# Tokens of a chunk, from the vocabulary V and the width D: V x tokens near CHUNK, so that a chunk
# stays near the processor (16 MB in float32), but no fewer tokens than D, since each chunk reads
# and writes the head's gradient once, and never more than LARGEST (128 MB).
# Measured on two busy cores, milliseconds of processor time, the three products alone first:
#   T=8192, D=256, V=4096:    93 | chunk 512: 108, 1024: 103, 2048: 134, 4096: 158 | dense: 324
#   T=2048, D=768, V=50304:  891 | chunk 256: 1519, 512: 1211, 1024: 1159, 2048: 1228
CHUNK, LARGEST = 2**22, 2**25
ROUND = 64


class _Plan(NamedTuple):
    """All that is known when tracing."""

    z_loss: float
    softcap: float | None
    chunk: int
    layout: str
    split: int  # parts in which the head's gradient contracts the tokens


def _wide(dtype):
    """Return the dtype of logits and sums: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# The products, GFLOP/s on one core (jax 0.12, T=2048, D=256, V=4096, bfloat16):
#   logits td,dv->tv 410 and td,vd->tv 460; dx tv,dv->td 660 and tv,vd->td 740; so either layout
#   of the head serves as it is. dhead td,tv->dv 110, with the tokens split in 4 to 16, 510; dhead
#   for layout VD is made as DV and transposed once at the end (vt,td->vd has 60).


def _logits(plan, x, head):
    form = "td,dv->tv" if plan.layout == "DV" else "td,vd->tv"
    logits = jnp.einsum(form, x, head, preferred_element_type=_wide(x.dtype))
    if plan.softcap is not None:
        cap = np.asarray(plan.softcap, logits.dtype)
        logits = jnp.tanh(logits / cap) * cap
    return logits


def _softmax(logits, targets):
    """Return exp(logits - top), its sum, top and the target's logit."""
    top = logits.max(-1)
    # One float32 array, summed and rounded after: XLA:CPU would compute the exponential twice.
    weights = lax.optimization_barrier(jnp.exp(logits - top[:, None]))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1, mode="clip")[:, 0]
    return weights, weights.sum(-1), top, chosen


def _loss(plan, weights, nll, lse):
    """Sum; tokens of weight 0 count nothing, whatever they hold."""
    each = nll + np.asarray(plan.z_loss, lse.dtype) * lse * lse if plan.z_loss else nll
    return jnp.where(weights == 0, jnp.zeros_like(each), weights * each).sum()


def _chunk_loss(plan, x, head, targets, weights):
    logits = _logits(plan, x, head)
    _, total, top, chosen = _softmax(logits, targets)
    lse = top + jnp.log(total)
    return _loss(plan, weights, lse - chosen, lse), lse - chosen


def _chunk_gradients(plan, x, head, targets, weights):
    """Return loss, nll [T], dx [T, D] and dhead [D, V] of one chunk."""
    dtype = _wide(x.dtype)
    logits = _logits(plan, x, head)
    soft, total, top, chosen = _softmax(logits, targets)
    lse = top + jnp.log(total)
    # d loss / d logits = row * (soft - hot at the target): the factor of a row stays out of the
    # [T, V] array and goes into the small operand instead.
    bend = 1 + np.asarray(2 * plan.z_loss, dtype) * lse if plan.z_loss else jnp.ones_like(lse)
    bend = jnp.where(jnp.abs(bend) < 1e-6, jnp.full_like(bend, 1e-6), bend)
    row = weights * bend / total
    at_target = jnp.exp(chosen - top) - total / bend
    if plan.softcap is not None:
        cap = np.asarray(plan.softcap, dtype)
        soft *= 1 - (logits / cap) * (logits / cap)
        at_target *= 1 - (chosen / cap) * (chosen / cap)
    d_logits = narrow(soft, x.dtype).at[lax.iota(targets.dtype, len(targets)), targets].set(
        at_target.astype(x.dtype), mode="drop", unique_indices=True)
    d_logits = lax.optimization_barrier(d_logits)
    form = "tv,dv->td" if plan.layout == "DV" else "tv,vd->td"
    dx = jnp.einsum(form, d_logits, head, preferred_element_type=dtype) * row[:, None]
    scaled = narrow(x.astype(dtype) * row[:, None], x.dtype)
    if plan.split > 1:
        cut = (plan.split, len(targets) // plan.split, -1)
        dhead = jnp.einsum("btd,btv->dv", scaled.reshape(cut), d_logits.reshape(cut),
                           preferred_element_type=dtype)
    else:
        dhead = jnp.einsum("td,tv->dv", scaled, d_logits, preferred_element_type=dtype)
    return _loss(plan, weights, lse - chosen, lse), lse - chosen, narrow(dx, x.dtype), dhead


def _in_chunks(plan, x, targets, weights):
    """Pad the tokens with ones of weight 0 and cut them."""
    def cut(a):
        a = jnp.pad(a, [(0, -len(a) % plan.chunk)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, plan.chunk, *a.shape[1:])

    return cut(x), cut(targets), cut(weights.astype(_wide(x.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(plan, x, head, targets, weights):
    cast = narrow(head, x.dtype)
    losses, nll = lax.map(lambda c: _chunk_loss(plan, c[0], cast, *c[1:]),
                          _in_chunks(plan, x, targets, weights))
    return losses.sum(), nll.reshape(-1)[:len(x)]


def _forward(plan, x, head, targets, weights):
    dtype = _wide(x.dtype)
    cast = narrow(head, x.dtype)
    chunks = _in_chunks(plan, x, targets, weights)

    def step(carry, chunk):
        loss, nll, dx, dhead = _chunk_gradients(plan, chunk[0], cast, *chunk[1:])
        return (carry[0] + loss, carry[1] + dhead), (nll, dx)

    D, V = head.shape if plan.layout == "DV" else head.shape[::-1]
    if len(chunks[0]) == 1:
        loss, nll, dx, dhead = _chunk_gradients(plan, chunks[0][0], cast,
                                                *(c[0] for c in chunks[1:]))
    else:
        start = (jnp.zeros((), dtype), jnp.zeros((D, V), dtype))
        (loss, dhead), (nll, dx) = lax.scan(step, start, chunks)
    if plan.layout == "VD":
        dhead = dhead.T
    dx = dx.reshape(-1, D)[:len(x)]
    return (loss, nll.reshape(-1)[:len(x)]), (dx, dhead.astype(head.dtype))


def _backward(plan, kept, cotangents):
    del plan
    dx, dhead = kept
    d_loss = cotangents[0]
    # In d_loss's own width: 0.3 is 0.3008 in bfloat16, and all of dx would be that much too long.
    wide_dx = dx.astype(d_loss.dtype) * d_loss
    return narrow(wide_dx, dx.dtype), dhead * d_loss.astype(dhead.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(x_TxD, head, targets_T, weights_T, *, z_loss=0.0, softcap=None, chunk=None,
                  head_layout="DV"):
    """Sum the weighted losses chunk by chunk."""
    T, D = x_TxD.shape
    V = head.shape[1] if head_layout == "DV" else head.shape[0]
    guess = max(min(max(CHUNK // V, D), LARGEST // V), ROUND)
    others = [{"chunk": n} for n in (guess // 4, guess // 2, 2 * guess, 4 * guess) if n >= ROUND]
    workload = {"T": T, "D": D, "V": V, "head": head_layout, "dtype": x_TxD.dtype.name}
    chunk = blocks.choose("cross_entropy", "xla", workload, {"chunk": guess}, others,
                          chunk=chunk)["chunk"]
    count = max(-(-T // chunk), 1)
    # Even chunks, so that little is padded.
    chunk = -(-T // count)
    split = 1
    if device.platform() == "cpu":
        chunk = -(-chunk // ROUND) * ROUND
        split = 8
    plan = _Plan(float(z_loss), softcap, max(chunk, 1), head_layout, split)
    return _cross_entropy(plan, x_TxD, head, targets_T, weights_T)
