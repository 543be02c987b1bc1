"""Attention in linear memory: signature and backends."""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.flash import gpu_plan, peers, reference, tpu_plan, xla
from kernels_pallas.op import Backend, Op


def _mosaic_gpu(*args, **kwargs):
    return generation.kernels(__name__).flash(*args, **kwargs)


def _mosaic_tpu(*args, **kwargs):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.flash import mosaic_tpu

    return mosaic_tpu.flash(*args, **kwargs)


op = Op(
    "flash",
    (
        Backend("xla", xla.flash),
        # Only where it is asked for, until it has run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        # Others' kernels, to measure against: only where they are asked for.
        Backend("cudnn", peers.cudnn, peers.cudnn_supports),
        Backend("splash", peers.splash, peers.splash_supports),
        Backend("tokamax", peers.tokamax, peers.tokamax_supports),
        # Only where it is asked for as well; splash serves less: PENDING.md.
        Backend("mosaic_tpu", _mosaic_tpu, tpu_plan.supports),
        Backend("reference", reference.flash),
    ),
)


def flash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
          causal=True, window=None, softcap=None, sinks_H=None, ends_BxS=None, stride=1, span=1,
          return_lse=False, block_q=None, block_k=None, first=None, implementation=None):
    """Attend: o[i] = sum_j softmax_j(scale q[i].k[j]) v[j] over the keys j that query i sees.

    Query i stands at position i + S - L (the last query at the last key), and sees key j when
    `causal` implies j <= position, `window` implies position - j < window, and both are of the
    same segment; segment 0 is padding and sees nothing. A row that sees nothing is 0.
    `softcap` c turns a score s into c tanh(s / c); a sink is one more logit per head that
    takes weight and has no value.

    Keys that stand for several tokens: with `stride`, `span` or `ends`, query i stands at row i,
    and key j at the last row it covers, ends[j], or j stride + span - 1 without ends. The caller
    promises that ends[j] is never before that, so that keys can be left out unread.

    `first` is the row of query 0 where the queries are a part of a row, in place of S - L, or of 0
    for keys that stand for several tokens; a number or a traced int32 scalar.

    `return_lse` adds the logarithm of the softmax's denominator, sinks included, -1e30 for a row
    that sees nothing; gradients pass through it.

    Shapes: q [B, L, H, Dk], k [B, S, K, Dk], v [B, S, K, Dv], H a multiple of K; segments_q int
        [B, L], segments_k int [B, S] (segments_q when not given); sinks [H]; ends int [B, S];
        o [B, L, H, Dv] in v's dtype; lse [B, L, H] in float32, or float64 for float64. block_q
        and block_k in queries and keys, chosen by the backend when None; Mosaic TPU rounds them up
        to multiples of 128, and Mosaic GPU's are fixed.
    Units: window, stride and span in tokens (rows), the query's own row within the window.
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: FlashAttention (2205.14135), algorithms 1 and 4; sinks after gpt-oss.
    """
    q, k, v = q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"flash: {name} has shape {x.shape}, expected four dims")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != v.dtype:
            raise ValueError(f"flash: {name} is {x.dtype} and v is {v.dtype}; one float dtype")
    (B, L, H, Dk), (S, K) = q.shape, v.shape[1:3]
    if k.shape != (B, S, K, Dk) or v.shape[0] != B or K == 0 or H % K:
        raise ValueError(f"flash: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if segments_q is None and segments_k is not None:
        raise ValueError("flash: segments_k is given and segments_q is not")
    if segments_k is None and segments_q is not None:
        segments_k = segments_q
    if segments_q is not None and (segments_q.shape, segments_k.shape) != ((B, L), (B, S)):
        raise ValueError(f"flash: segments_q {segments_q.shape} and segments_k "
                         f"{segments_k.shape}, expected {(B, L)} and {(B, S)}")
    if sinks_H is not None and sinks_H.shape != (H,):
        raise ValueError(f"flash: sinks_H has shape {sinks_H.shape}, expected {(H,)}")
    if ends_BxS is not None and ends_BxS.shape != (B, S):
        raise ValueError(f"flash: ends_BxS has shape {ends_BxS.shape}, expected {(B, S)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"flash: softcap={softcap} must be above 0")
    for name, x in (("window", window), ("stride", stride), ("span", span),
                    ("block_q", block_q), ("block_k", block_k)):
        if x is not None and not (isinstance(x, numbers.Integral) and x > 0):
            raise ValueError(f"flash: {name}={x} must be a whole number above 0")
    return op(q, k, v, segments_q=segments_q, segments_k=segments_k, scale=scale, causal=causal,
              window=window, softcap=softcap, sinks_H=sinks_H, ends_BxS=ends_BxS, stride=stride,
              span=span, return_lse=return_lse, block_q=block_q, block_k=block_k, first=first,
              implementation=implementation)


explain = op.explain
