"""Few query blocks, unrolled: every start and size is a Python number. Letters as in pairs.py."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.flash import pairs, visits


def _bias(plan, q, k, masked, marks, dtype):
    if not (masked or marks.any):
        return None
    segments_q, segments_k, ends, _ = marks
    cut = pairs.Marks(None if segments_q is None else segments_q[:, slice(*q)],
                      None if segments_k is None else segments_k[:, slice(*k)],
                      None if ends is None else ends[:, slice(*k)])
    return pairs.bias_of(plan, q[0], k[0], q[1] - q[0], k[1] - k[0], cut, dtype)


def forward(plan, q, k, v, marks, sinks):
    """Return o [B, K, G, L, Dv] and lse [B, K, G, L]; k and v [N, S, D]."""
    B, K, G = q.shape[:3]
    dtype = pairs.wide(q.dtype)
    done = []
    for a in range(0, plan.L, plan.block_q):
        b = min(a + plan.block_q, plan.L)
        keys = list(visits.keys(plan, a, b, marks.ends is not None))
        # Nothing to merge with: the first pair starts the softmax.
        state = None
        if sinks is not None or not keys:
            state = pairs.start(sinks, B, K, G, b - a, v.shape[-1], dtype)
        for c, d, masked in keys:
            bias = _bias(plan, (a, b), (c, d), masked, marks, dtype)
            state = pairs.add_pair(plan, q[:, :, :, a:b], k[:, c:d], v[:, c:d], bias, state)
        done.append(pairs.finish(state, v.dtype))
    o, lse = zip(*done, strict=True)
    return jnp.concatenate(o, 3), jnp.concatenate(lse, 3)


def _add_keys(total, part, start, stop, S):
    """Add part to the keys [start, stop) of total, which is None before the first."""
    widths = ((0, 0), (0, 0), (start, S - stop))
    part = jnp.pad(part, widths) if start or stop < S else part
    return part if total is None else total + part


def backward(plan, q, q_T, k, v, do, do_T, marks, lse, delta):
    """Return dq [B, K, G, L, Dk], dk [N, Dk, S], dv [N, Dv, S]; dq and dk before scale."""
    B, K, G = q.shape[:3]
    N, dtype = B * K, lse.dtype
    dk, dv, done = None, None, []
    for a in range(0, plan.L, plan.block_q):
        b = min(a + plan.block_q, plan.L)
        rows = [x[:, :, :, a:b].reshape(N, G * (b - a), -1) for x in (q, do)]
        rows_T = [x[..., a:b].reshape(N, -1, G * (b - a)) for x in (q_T, do_T)]
        dq = None
        for c, d, masked in visits.keys(plan, a, b, marks.ends is not None):
            bias = _bias(plan, (a, b), (c, d), masked, marks, dtype)
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
