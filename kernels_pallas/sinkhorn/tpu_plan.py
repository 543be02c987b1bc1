"""What the TPU kernel of sinkhorn can do.

Matrices lie along sublanes and lanes, 1,024 to a register, and a program has a register for each
number of theirs, so that sums are additions of registers. By arithmetic for 8,192 matrices of
4 x 4 and 20 iterations on one core: a division of all numbers by their sums is 12 additions, 4
reciprocals and 16 products of registers, four of which it does at once, so about 10 cycles; 40 of
them for 8 programs are 2 us forward. XLA's loop has the same work in 38 steps, each of which reads
and writes memory.
"""

from __future__ import annotations

from kernels_pallas import device
from kernels_pallas.tpu import LANES, VMEM

ROWS = 8  # of 128 matrices in a program: one register for each number
WIDEST = 16  # of a matrix: every operation is written out for all of its numbers
MATRICES = ROWS * LANES


def fast_bytes(R: int, iterations: int) -> int:
    """Return the fast memory of the backward pass: three arrays twice, and every sum."""
    return (6 * R * R + (2 * iterations - 1) * R) * MATRICES * 4


def supports(logits, *, iterations, eps) -> str | None:
    """Return None, or why the TPU kernel cannot run this call."""
    del eps
    if lacks := device.lacks_tpu(logits=logits):
        return lacks
    R = logits.shape[-1]
    if not 1 <= R <= WIDEST or logits.size == 0:
        return f"needs matrices of up to {WIDEST} rows, logits are {logits.shape}"
    if fast_bytes(R, iterations) > VMEM:
        return (f"needs fast memory for every sum, {iterations} iterations of {R} rows take "
                f"{fast_bytes(R, iterations)} bytes of {VMEM}")
    return None
