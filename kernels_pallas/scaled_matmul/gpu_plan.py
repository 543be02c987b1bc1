"""What the Hopper kernels of scaled_matmul can do, and the tables of their work."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import device
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.scaled_matmul.tiles import TILE

_BARRIERS = 2048  # bytes of shared memory kept for them
_ROWS = 8  # that a store handles at once: the tiling of shared memory


def whole(n: int, unit: int = TILE) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


def supports(x, w, layout, *, power_of_two=False) -> str | None:
    """Return None, or why the Hopper kernels cannot run this call."""
    del power_of_two
    if lacks := device.lacks_hopper("bfloat16", "float32", x=x, w=w):
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
