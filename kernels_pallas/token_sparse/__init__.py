"""Attention to tokens that every query lists for itself: signatures and backends."""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from kernels_pallas.op import Backend, Op
from kernels_pallas.token_sparse import gpu_plan, reference, tpu_plan, xla


def _mosaic_gpu(*args, **kwargs):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.token_sparse import mosaic_gpu

    return mosaic_gpu.token_sparse(*args, **kwargs)


def _mosaic_tpu(*args, **kwargs):
    from kernels_pallas.token_sparse import mosaic_tpu

    return mosaic_tpu.token_sparse(*args, **kwargs)


def _mass_mosaic_gpu(*args, **kwargs):
    from kernels_pallas.token_sparse import mosaic_gpu

    return mosaic_gpu.token_mass(*args, **kwargs)


def _mass_mosaic_tpu(*args, **kwargs):
    from kernels_pallas.token_sparse import mosaic_tpu

    return mosaic_tpu.token_mass(*args, **kwargs)


op = Op(
    "token_sparse",
    (
        Backend("xla", xla.token_sparse),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, tpu_plan.supports),
        Backend("reference", reference.token_sparse),
    ),
)
mass = Op(
    "token_mass",
    (
        Backend("xla", xla.token_mass),
        Backend("mosaic_gpu", _mass_mosaic_gpu, gpu_plan.supports_mass),
        Backend("mosaic_tpu", _mass_mosaic_tpu, tpu_plan.supports_mass),
        Backend("reference", reference.token_mass),
    ),
)


def token_sparse(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, *, v_dim, scale, unique=False,
                 return_lse=False, implementation=None):
    """Attend to the listed tokens: one softmax over the up to N of them, the same for all heads.

    There is one key head, and a token's value is the first v_dim dims of its key. -1, as any
    number outside [0, S), lists nothing; a token listed twice counts once, and `unique` is the
    caller's promise that none is, which saves looking for them. Causality and segments are the
    caller's, who lists only what a query may see. A row that lists nothing is 0, its lse -1e30.

    Shapes: q [B, L, H, Dk], kv [B, S, Dk], chosen int [B, L, N]; o [B, L, H, v_dim] in kv's
        dtype, and with return_lse also the logarithm of the softmax's denominator, [B, L, H] in
        float32, or float64 for float64, which has a gradient too.
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: DeepSeek-V3.2 (2512.02556), section 2.1, attention in multi-query form; DeepSeek-V4
        (2606.19348), compressed sparse attention.
    """
    _check("token_sparse", q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN)
    Dk = kv_BxSxDk.shape[-1]
    if not (isinstance(v_dim, numbers.Integral) and 0 < v_dim <= Dk):
        raise ValueError(f"token_sparse: v_dim={v_dim} must be a whole number from 1 to {Dk}, "
                         "the width of kv")
    return op(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, v_dim=int(v_dim), scale=scale,
              unique=bool(unique), return_lse=return_lse, implementation=implementation)


def token_mass(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, lse_BxLxH, *, scale, implementation=None):
    """Return the weight of every listed token, summed over heads: what an indexer should learn.

    mass[n] = sum_h exp(scale q_h.kv[chosen[n]] - lse_h), 0 where nothing is listed; a token
    listed twice gets it twice. No gradient flows through it.

    Shapes: q [B, L, H, Dk], kv [B, S, Dk], chosen int [B, L, N], lse [B, L, H] of token_sparse;
        mass [B, L, N] in float32, or float64 for float64.
    Errors: ValueError as for token_sparse.
    Source: DeepSeek-V3.2 (2512.02556), section 2.1, the indexer's target.
    """
    _check("token_mass", q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN)
    if lse_BxLxH.shape != q_BxLxHxDk.shape[:3]:
        raise ValueError(f"token_mass: lse {lse_BxLxH.shape} does not fit q {q_BxLxHxDk.shape}")
    return mass(q_BxLxHxDk, kv_BxSxDk, chosen_BxLxN, lse_BxLxH, scale=scale,
                implementation=implementation)


def _check(name, q, kv, chosen):
    for what, x, dims in (("q", q, 4), ("kv", kv, 3), ("chosen", chosen, 3)):
        if x.ndim != dims:
            raise ValueError(f"{name}: {what} has shape {x.shape}, expected {dims} dims")
    if not jnp.issubdtype(kv.dtype, jnp.floating) or q.dtype != kv.dtype:
        raise ValueError(f"{name}: q is {q.dtype} and kv is {kv.dtype}; one float dtype")
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"{name}: chosen is {chosen.dtype}, expected integers")
    if kv.shape[0] != q.shape[0] or kv.shape[2] != q.shape[3] or q.shape[2] == 0:
        raise ValueError(f"{name}: shapes do not fit: q {q.shape}, kv {kv.shape}")
    if chosen.shape[:2] != q.shape[:2]:
        raise ValueError(f"{name}: chosen {chosen.shape} does not fit q {q.shape}")


explain = op.explain
