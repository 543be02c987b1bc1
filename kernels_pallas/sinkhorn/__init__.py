"""sinkhorn: small matrices made to have rows and columns that sum to one: signature, backends."""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from kernels_pallas.op import Backend, Op
from kernels_pallas.sinkhorn import gpu_plan, reference, tpu_plan, xla


def _mosaic_gpu(*args, **kwargs):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.sinkhorn import mosaic_gpu

    return mosaic_gpu.sinkhorn(*args, **kwargs)


def _mosaic_tpu(*args, **kwargs):
    from kernels_pallas.sinkhorn import mosaic_tpu

    return mosaic_tpu.sinkhorn(*args, **kwargs)


op = Op(
    "sinkhorn",
    (
        Backend("xla", xla.sinkhorn),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, tpu_plan.supports),
        Backend("reference", reference.sinkhorn),
    ),
)


def sinkhorn(logits, *, iterations, eps, implementation=None):
    """Return positive matrices whose columns sum to one, and rows nearly; with its gradient.

    The first of the iterations is a softmax over rows, plus eps, and a division by columns' sums;
    each other divides by rows' sums and then by columns', eps added to every sum.

    Shapes: logits [..., R, R] float32 or float64 -> the same.
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: 2512.24880, equation 8; order and constants of the released code.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn: logits {logits.shape}, expected square matrices")
    if logits.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"sinkhorn: logits are {logits.dtype}, expected float32 or float64")
    if not (isinstance(iterations, numbers.Integral) and iterations > 0):
        raise ValueError(f"sinkhorn: iterations={iterations} must be a whole number above 0")
    if not eps >= 0:
        raise ValueError(f"sinkhorn: eps={eps} must not be below 0")
    return op(logits, iterations=int(iterations), eps=float(eps), implementation=implementation)


explain = op.explain

__all__ = ["explain", "op", "sinkhorn"]
