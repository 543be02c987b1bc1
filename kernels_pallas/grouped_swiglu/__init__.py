"""grouped_swiglu: silu(x gate) * (x up) of each row's expert: signature and backends."""

from kernels_pallas import generation
from kernels_pallas.grouped_matmul import visits
from kernels_pallas.grouped_swiglu import gpu_plan, reference, xla
from kernels_pallas.op import Backend, Op


def _mosaic_gpu(x, gate, up, layout):
    return generation.kernels(__name__).grouped_swiglu(x, gate, up, layout)


def _mosaic_tpu(x, gate, up, layout):
    from kernels_pallas.grouped_swiglu import mosaic_tpu

    return mosaic_tpu.grouped_swiglu(x, gate, up, layout)


op = Op(
    "grouped_swiglu",
    (
        Backend("xla", xla.grouped_swiglu),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, visits.supports_swiglu),
        Backend("reference", reference.grouped_swiglu),
    ),
)


def grouped_swiglu(x_RxD, gate_ExDxF, up_ExDxF, layout, *, implementation=None):
    """Return silu(x gate[e]) * (x up[e]) for each row of expert e, anything finite for other rows.

    Shapes: x [R, D], gate and up [E, D, F] in one float dtype, layout a grouped_matmul.Layout over
        R rows -> [R, F] in x's dtype. Gradients as grouped_matmul's.
    Errors: ValueError for shapes that do not fit, and for an implementation that cannot run.
    Source: 2002.05202, equation 6.
    """
    shape = (layout.sizes.shape[0], x_RxD.shape[-1])
    if gate_ExDxF.shape != up_ExDxF.shape or gate_ExDxF.shape[:2] != shape:
        raise ValueError(f"grouped_swiglu: gate {gate_ExDxF.shape} and up {up_ExDxF.shape} do not "
                         f"fit x {x_RxD.shape} and a layout of {shape[0]} experts")
    if gate_ExDxF.dtype != up_ExDxF.dtype:
        raise ValueError(f"grouped_swiglu: gate is {gate_ExDxF.dtype} and up {up_ExDxF.dtype}")
    return op(x_RxD, gate_ExDxF, up_ExDxF, layout, implementation=implementation)


explain = op.explain

__all__ = ["explain", "grouped_swiglu", "op"]
