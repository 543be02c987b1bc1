"""grouped_matmul: rows sorted by expert times the expert's matrix, group sizes as data."""

from kernels_pallas import generation
from kernels_pallas.grouped_matmul import peers, reference, tiles, visits, xla
from kernels_pallas.grouped_matmul.layout import Layout, aligned, contiguous, rows_needed
from kernels_pallas.op import Backend, Op


def _mosaic_gpu(x, w, layout):
    return generation.kernels(__name__).grouped_matmul(x, w, layout)


def _mosaic_tpu(x, w, layout):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.grouped_matmul import mosaic_tpu

    return mosaic_tpu.grouped_matmul(x, w, layout)


op = Op(
    "grouped_matmul",
    (
        Backend("xla", xla.grouped_matmul),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, tiles.supports),
        Backend("mosaic_tpu", _mosaic_tpu, visits.supports),
        Backend("tokamax", peers.tokamax, peers.tokamax_supports),
        Backend("reference", reference.grouped_matmul),
    ),
)


def grouped_matmul(x, w, layout, *, implementation=None):
    """Each row of expert e times w[e]; rows that belong to no expert give anything finite.

    Shapes: x [R, D], w [E, D, F] in any float dtype, layout a Layout over R rows -> [R, F].
    Rows of no group must be finite in x and zero in the cotangent of the result, which they are
    when nobody reads them. The gradient of w has w's dtype and is accumulated in float32; an expert
    without rows gets a zero gradient.
    """
    return op(x, w, layout, implementation=implementation)


explain = op.explain

__all__ = ["Layout", "aligned", "contiguous", "explain", "grouped_matmul", "op", "rows_needed"]
