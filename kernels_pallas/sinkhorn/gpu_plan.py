"""What the GPU kernel of sinkhorn can do.

Compiled by XLA for an H200, 20 iterations are 62 kernels forward and 100 more backward, one after
another in two loops, for half a megabyte of 8192 matrices of 4 x 4: at 2 us each 0.3 ms, where
reading and writing four streams of 2048 for as many tokens takes 56 us. A matrix fits into the
registers of one thread.
"""

from __future__ import annotations

from kernels_pallas import generation

LANES = 128  # matrices of a program, one for each thread of a warpgroup
WIDEST = 8  # of a matrix: two of 64 numbers, it and its gradient, stay in registers
SHARED = 232448 - 1024  # bytes of shared memory, without what barriers need


def sums_bytes(R: int, iterations: int) -> int:
    """Return the memory of a program's sums, which its backward pass divides by again."""
    return 2 * iterations * R * LANES * 4


def supports(logits, *, iterations, eps) -> str | None:
    """Return None, or why the GPU kernel cannot run this call."""
    del eps
    if lacks := generation.lacks_both("float32", logits=logits):
        return lacks
    R = logits.shape[-1]
    if not 1 <= R <= WIDEST or logits.size == 0:
        return f"needs matrices of up to {WIDEST} rows, logits are {logits.shape}"
    if sums_bytes(R, iterations) > SHARED:
        return (f"needs memory for every sum, {iterations} iterations of {R} rows take "
                f"{sums_bytes(R, iterations)} bytes of {SHARED}")
    return None
