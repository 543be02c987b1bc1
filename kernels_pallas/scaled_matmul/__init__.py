"""scaled_matmul: products in 8-bit floats with a scale per small tile: signature and backends."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.op import Backend, Op
from kernels_pallas.scaled_matmul import gpu_plan, reference, tpu_plan, xla
from kernels_pallas.scaled_matmul.tiles import TILE, dequantize, quantize


def _mosaic_gpu(*args, **kwargs):
    return generation.kernels(__name__).scaled_matmul(*args, **kwargs)


def _mosaic_tpu(*args, **kwargs):
    from kernels_pallas.scaled_matmul import mosaic_tpu

    return mosaic_tpu.scaled_matmul(*args, **kwargs)


op = Op(
    "scaled_matmul",
    (
        Backend("xla", xla.scaled_matmul),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, tpu_plan.supports),
        Backend("reference", reference.scaled_matmul),
    ),
)


def scaled_matmul(x, w, layout=None, *, power_of_two=False, implementation=None):
    """x @ w with both rounded to E4M3; with a layout, each row of expert e times w[e].

    x is scaled by tiles of 1 x 128 along D, w by blocks of 128 x 128, each by the largest magnitude
    over 448, and every 128 of D the sum goes to float32 where the scales are applied. Both
    gradients are such products too: dx of the result's cotangent, in 1 x 128 tiles along F, and w
    as it was; dw of x and the cotangent in tiles of 128 rows x 1, counted from each group's start.
    With `power_of_two` scales are rounded up to powers of two, so that scaling rounds nothing.

    Shapes: x [..., D] and w [D, F] -> [..., F]; with a Layout over R rows x [R, D] and w [E, D, F]
        -> [R, F]. Results and dx in x's dtype, dw in w's, summed in float32.
    Errors: ValueError for shapes or dtypes that do not fit, and for an implementation that cannot
        run.
    Source: DeepSeek-V3 (2412.19437), section 3.3.
    Differs: dw rounds x itself; DeepSeek-V3 keeps its 8-bit form and rounds that once more. Of
        TPUs a TPU7x multiplies in 8 bits, earlier ones turn E4M3 to bfloat16 on its way into the
        matrix unit.
    """
    dims = 2 if layout is None else 3
    if x.ndim < 1 or w.ndim != dims or x.shape[-1] != w.shape[-2]:
        raise ValueError(f"scaled_matmul: x {x.shape} does not fit w {w.shape}"
                         f"{'' if layout is None else ' of experts'}")
    if layout is not None and layout.split:
        raise ValueError("scaled_matmul: needs each expert's rows in one place, the layout was "
                         "made with split=True")
    if layout is not None and (x.shape[0], w.shape[0]) != (layout.rows, layout.sizes.shape[0]):
        raise ValueError(f"scaled_matmul: x {x.shape} and w {w.shape} do not fit a layout of "
                         f"{layout.rows} rows and {layout.sizes.shape[0]} experts")
    for name, a in (("x", x), ("w", w)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"scaled_matmul: {name} is {a.dtype}, expected floats")
    return op(x, w, layout, power_of_two=bool(power_of_two), implementation=implementation)


explain = op.explain

__all__ = ["TILE", "dequantize", "explain", "op", "quantize", "scaled_matmul"]
