"""Mosaic GPU lowers every small workload for its chips: interpretation does not ask for all that
the compiler does, such as rows of whole 128 bytes in the chip's memory."""

import jax
import pytest

from kernels_pallas import cases, device
from kernels_pallas.chips import CHIPS
from tests.kernels.test_mosaic_gpu import runs

# linear has no kernel of ours, and those of block_sparse serve none of its small workloads;
# sinkhorn's copies nothing, and 64 numbers of a matrix are traced for minutes
OPS = [op for op in cases.OPS if op not in ("linear", "block_sparse", "sinkhorn")]


@runs
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_every_small_workload_is_lowered(chip, op):
    lowered = 0
    for case in cases.cases((op,), parity=True, abstract=True, dtype="bfloat16"):
        with device.assume(CHIPS[chip].target):
            arguments, keywords = case.shapes()
            if case.op.explain(*arguments, **keywords)["mosaic_gpu"] is not None:
                continue
            arrays = {k: x for k, x in keywords.items() if isinstance(x, jax.ShapeDtypeStruct)}
            options = {k: x for k, x in keywords.items() if k not in arrays}
            direction, cotangent = case.directions[-1], None
            if direction == "gradient":
                forward = case.function("forward", options, "mosaic_gpu")
                cotangent = jax.eval_shape(forward, arguments, arrays, None)
            function = case.function(direction, options, "mosaic_gpu")
            jax.jit(function).trace(arguments, arrays, cotangent).lower(
                lowering_platforms=("cuda",))
        lowered += 1
        jax.clear_caches()
    assert lowered > 1
