"""What the GPU kernels of scaled_matmul can do, and the sizes of their work."""

from __future__ import annotations

from kernels_pallas import generation
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.scaled_matmul.tiles import TILE, whole

_BARRIERS = 2048  # bytes of shared memory kept for them
_ROWS = 8  # that a store handles at once: the tiling of shared memory


def supports(x, w, layout, *, power_of_two=False) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    del power_of_two
    if lacks := generation.lacks_both("bfloat16", "float32", x=x, w=w):
        return lacks
    for name, a in (("x", x), ("w", w)):
        if a.size == 0:
            return f"needs numbers to multiply, {name} has shape {a.shape}"
    if layout is not None and grouped.grain(layout) % _ROWS:
        return (f"needs group starts in multiples of {_ROWS} rows, the layout has blocks of "
                f"{layout.block} and {layout.seats} seats")
    return None


def stages(out_itemsize: int, vectors: int) -> int:
    """Return how many stages fit: two tiles of 128 x 128 bytes and `vectors` of 128 float32."""
    out = 2 * 64 * grouped.COLUMNS * out_itemsize
    left = grouped.SHARED - _BARRIERS - out
    return left // (2 * TILE * TILE + vectors * 4 * TILE)


def width(columns: int) -> int:
    """Return the columns of Blackwell's tiles of a result of so many, in whole tiles of 128.

    A wide one reads 3/4 of the bytes for a product; an estimate, as of grouped_matmul's tiles.
    """
    return 2 * TILE if 1.3 * columns > whole(columns, 2 * TILE) else TILE


def wide_stages(out_itemsize: int, n: int) -> int:
    """Return how many stages fit on Blackwell: 128 rows and n columns, 128 bytes of each."""
    left = grouped.SHARED - _BARRIERS - 2 * TILE * grouped.COLUMNS * out_itemsize
    return min(left // (TILE * (TILE + n)), 8)
