"""What the GPU kernel of compress can do.

Compiled by XLA for an H200, pooling blocks of 4 of 8192 tokens (two streams of 512) moves 187 MB
forward and 503 with the gradients, in 10 kernels, where reading what is there and writing what is
asked for is 36 and 105 MB: 105 us at its bandwidth, and 22. Blocks of 128 move 170 MB in place of
50; there one thread would read 128 numbers one after another, and XLA's program stays.
"""

from __future__ import annotations

from kernels_pallas import generation

LANES = 128  # threads of a program, each with one channel or two neighbours
MOST = 16  # tokens of a block, all of which a thread has in registers, and of the block before


def lanes(channels: int) -> int:
    """Return the channels of a program."""
    return 2 * LANES if channels % (2 * LANES) == 0 else LANES


def supports(own, bias, follows) -> str | None:
    """Return None, or why the GPU kernel cannot run this call."""
    del bias, follows
    if lacks := generation.lacks_both(own=own):
        return lacks
    if own.shape[2] > MOST:
        return f"needs blocks of up to {MOST} tokens, R is {own.shape[2]}"
    if own.shape[5] % LANES or own.size == 0:
        return f"needs channels in multiples of {LANES}, own is {own.shape}"
    return None
