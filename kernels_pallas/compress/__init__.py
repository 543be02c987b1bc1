"""compress: one entry for each block of tokens, pooled channel by channel: signature, backends."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.compress import gpu_plan, reference, tpu_plan, xla
from kernels_pallas.op import Backend, Op


def _mosaic_gpu(*args):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.compress import mosaic_gpu

    return mosaic_gpu.compress(*args)


def _mosaic_tpu(*args):
    from kernels_pallas.compress import mosaic_tpu

    return mosaic_tpu.compress(*args)


op = Op(
    "compress",
    (
        Backend("xla", xla.compress),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, tpu_plan.supports),
        Backend("reference", reference.compress),
    ),
)


def compress(own_BxMxRx2xSxC, bias_RxSxC, follows_BxM, *, implementation=None):
    """Return each block's values, weighed by a softmax over its tokens for every channel.

    `own` holds the values and the logits of a block's R tokens, in S streams of features, and bias
    is added to the logits. The last stream is of the block itself; of two, the first is for the
    block after it, which pools it as well where it `follows`: so R or 2 R tokens are pooled.

    Shapes: own [B, M, R, 2, S, C], bias [R, S, C], follows bool [B, M] -> [B, M, C] in own's dtype,
        computed in float32, or float64 for float64. follows [:, 0] counts as False.
    Errors: ValueError for shapes that do not fit, and for an implementation that cannot run.
    Source: DeepSeek-V4 (2606.19348), the equations of CSA (two streams) and HCA (one).
    """
    own, shape = own_BxMxRx2xSxC, own_BxMxRx2xSxC.shape
    if own.ndim != 6 or shape[3] != 2 or shape[4] not in (1, 2):
        raise ValueError(f"compress: own {shape}, expected [B, M, R, 2, S, C] of 1 or 2 streams")
    if bias_RxSxC.shape != (shape[2], *shape[4:]) or follows_BxM.shape != shape[:2]:
        raise ValueError(f"compress: bias {bias_RxSxC.shape} and follows {follows_BxM.shape} do "
                         f"not fit own {shape}")
    if not jnp.issubdtype(own.dtype, jnp.floating):
        raise ValueError(f"compress: own is {own.dtype}, expected floats")
    return op(own, bias_RxSxC, follows_BxM, implementation=implementation)


explain = op.explain

__all__ = ["compress", "explain", "op"]
