"""What the GPU kernels of scaled_matmul can do, and the tables of their work."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.scaled_matmul.tiles import TILE

_BARRIERS = 2048  # bytes of shared memory kept for them
_ROWS = 8  # that a store handles at once: the tiling of shared memory


def whole(n: int, unit: int = TILE) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


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


def row_tiles(layout):
    """Return where the tiles of 128 rows lie that a group's rows are cut in from its start on.

    Shapes: (row [P, 128] int32, whether it is the group's [P, 128], groups [E, 3] int32), P tiles
    of which the last may be of no group. Columns of groups, those of most tiles first: expert,
    first tile, tiles.
    """
    sizes = layout.sizes.astype(jnp.int32)
    experts = sizes.shape[0]
    count = (sizes + (TILE - 1)) // TILE
    ends = jnp.cumsum(count, dtype=jnp.int32)
    tile = jnp.arange(layout.rows // TILE + experts, dtype=jnp.int32)
    # of few entries: all compared at once instead of a loop of searches
    expert = (tile[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    some = expert < experts
    expert = jnp.minimum(expert, experts - 1)
    within = (tile - (ends - count)[expert]) * TILE
    within = within[:, None] + jnp.arange(TILE, dtype=jnp.int32)[None]
    mine = some[:, None] & (within < sizes[expert][:, None])
    row = jnp.where(mine, layout.starts[expert].astype(jnp.int32)[:, None] + within, 0)
    order = jnp.argsort(-sizes, stable=True).astype(jnp.int32)
    return row, mine, jnp.stack([order, (ends - count)[order], count[order]], 1)
