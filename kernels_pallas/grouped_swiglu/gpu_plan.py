"""What the GPU kernels of grouped_swiglu can do, and the sizes of its tiles."""

from __future__ import annotations

from kernels_pallas.grouped_matmul import tiles as grouped

_BARRIERS = 2048  # bytes of shared memory kept for them


def supports(x, gate, up, layout) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    del up
    return grouped.supports(x, gate, layout)


def columns(F: int) -> int:
    """Return the columns of each of the two products of a tile: 128 fill the registers, or
    tensor memory with two tiles."""
    return 128 if F > 64 else 64


def stages(n: int) -> int:
    """Return how many stages fit: rows and two matrices' tiles."""
    results = 2 * 64 * grouped.COLUMNS * 2
    left = grouped.SHARED - _BARRIERS - results
    return min(left // (2 * grouped.TILE_K * (grouped.TILE_M + 2 * n)), 8)
