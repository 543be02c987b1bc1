"""What the TPU kernel of compress can do, and how it cuts a call.

Tokens are rows of memory, [B x M x R, 2 x S x C]. csa_8k, whose tokens are an argument of six dims,
takes as much again beside its arguments (44 MB forward on v5p, 43 on TPU7x): memory of its last
dims is tiled 2 x 128, and XLA's reshape to rows copies it; on v6e into fast memory, which is not
counted. Given as [B, M x R, 2 x S x C] and reshaped, the same program copies nothing: a bitcast,
and 9.5 MB. After two products of 1,024 stacked, as in the model, XLA lays the stack the other way
round and turns it about once (v5p), which taking values and logits apart would save.

A program has some entries and all their tokens' numbers: 128 channels of the r-th token of every
block are rows R apart, which a TPU reads at a stride from 32-bit memory only, so the tokens are
kept in float32.
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
    """Return the entries of a program, None where no number of them fits.

    Half of the fast memory has room for enough of them, but for HCA's, of 128 tokens each.
    """
    sizes = [(n, fast_bytes(R, S, C, itemsize, n)) for n in _ENTRIES]
    return next((n for limit in (VMEM // 2, VMEM) for n, taken in sizes if taken <= limit), None)


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
        return (f"needs at most {VMEM} bytes of fast memory, blocks of {R} tokens and {S} x "
                f"{C} channels take {least}")
    return None
