"""What the TPU kernel of compress can do, and how it cuts a call.

Tokens are rows of memory as they come, [B x M x R, 2 x S x C]. Compiled, csa_8k still takes as much
again beside its arguments on v5p and TPU7x (44 MB forward, 80 with gradients; 4 and 9 on v6e), so
XLA seems to copy them there, which has not been looked into. A program has some entries and all
their tokens' numbers: 128 channels of the r-th token of every block are rows R apart, which a TPU
reads at a stride from 32-bit memory only, so the tokens are kept in float32.
"""

from __future__ import annotations

from kernels_pallas import device
from kernels_pallas.tpu import LANES, VMEM

# Entries of a program, fewest last: rows of whole registers, in 32 bits and in 16.
_ENTRIES = (128, 64, 32, 16)


def fast_bytes(R: int, S: int, C: int, itemsize: int, entries: int) -> int:
    """Return the fast memory of the backward pass: arrays twice, and the tokens in float32."""
    tokens, numbers = entries * R, 2 * S * C
    return tokens * numbers * (4 * itemsize + 4) + entries * (2 * 3 * C * 4 + 8 * LANES * 4)


def entries(R: int, S: int, C: int, itemsize: int) -> int | None:
    """Return the entries of a program, None where no number of them fits."""
    return next((n for n in _ENTRIES if fast_bytes(R, S, C, itemsize, n) <= VMEM // 2), None)


def supports(own, bias, follows) -> str | None:
    """Return None, or why the TPU kernel cannot run this call."""
    del bias, follows
    if lacks := device.lacks_tpu(own=own):
        return lacks
    R, _, S, C = own.shape[2:]
    if C % LANES or own.size == 0:
        return f"needs channels in multiples of {LANES}, own is {own.shape}"
    if entries(R, S, C, own.dtype.itemsize) is None:
        least = fast_bytes(R, S, C, own.dtype.itemsize, _ENTRIES[-1])
        return (f"needs at most {VMEM // 2} bytes of fast memory, blocks of {R} tokens and {S} x "
                f"{C} channels take {least}")
    return None
