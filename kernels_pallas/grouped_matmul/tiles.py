"""What the GPU kernels of grouped_matmul do in which order: tiles, and tables of work as data.

A group owns the rows from its start to the next group's start. Its used rows are cut in tiles
from its start on; what it owns beyond the last of them is cut likewise, and only has to be zeroed.
So no tile holds rows of two groups, and every row of the buffer is written once.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from kernels_pallas import blocks, device, generation

# Two of Hopper's warpgroups with 64 rows each, all rows of Blackwell's tensor memory; 64 bfloat16
# are the 128 bytes of the widest swizzle.
TILE_M, TILE_K = 128, 64
COLUMNS = 64  # of a result, written at once
# Cost of a product tile per column, by its width: what is loaded per product falls with it. An
# estimate from bytes per product (128 x n tiles read 1/128 + 1/n per product); tune.py measures.
_WIDTHS = {256: 1.0, 192: 1.1, 128: 1.3, 64: 2.0}
# Tables of the multiprocessors' shared memory: sm_90 and sm_100 give a block 227 KiB.
SHARED = 232448
# Rows that a store or a mask handles at once: the tiling of shared memory.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel. Units: rows, columns, and buffers in flight."""

    n: int  # columns of a product tile
    stages: int
    grain: int  # every group's start is a multiple of it
    cores: int  # programs, one for each multiprocessor
    out_slots: int = 1


def supports(x, w, layout) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    lacks = generation.lacks_both(x=x) or generation.lacks_both("bfloat16", "float32", w=w)
    if lacks:
        return lacks
    if layout.split:
        return "needs each expert's rows in one place, the layout was made with split=True"
    for name, width in (("D", w.shape[1]), ("F", w.shape[2])):
        if width % TILE_K:
            return f"needs widths in multiples of {TILE_K}, {name} is {width}"
    if grain(layout) % _ROWS:
        return (f"needs group starts in multiples of {_ROWS} rows, the layout has blocks of "
                f"{layout.block} and {layout.seats} seats")
    return None


def grain(layout) -> int:
    """Return what every group's start is a multiple of, at most TILE_K."""
    return math.gcd(layout.block, layout.seats, TILE_K)


def choose(layout, columns: int, out_itemsize: int, *, product: str = "rows",
           contracted: int = 0) -> Tiles:
    """Return the tiles for results of so many columns: tuned ones, or those of least cost.

    `product` is rows (times matrices), transposed, or weights (their gradient, whose rows are
    `contracted` wide); both names and numbers are what the tuned file knows a product by.
    """
    def cost(n):
        return -(-columns // n) * n * _WIDTHS[n]

    workload = {"product": product, "rows": layout.rows, "experts": layout.sizes.shape[0],
                "contracted": contracted, "columns": columns}
    n = blocks.choose("grouped_matmul", "mosaic_gpu", workload, {"n": min(_WIDTHS, key=cost)},
                      [{"n": n} for n in _WIDTHS])["n"]
    # The columns that are written at once take turns in the slots, so these divide a tile's.
    out_slots = 2 if out_itemsize == 2 and n // COLUMNS % 2 == 0 else 1
    out = 2 * out_slots * (TILE_M // 2) * COLUMNS * out_itemsize
    left = SHARED - 2048 - out  # 2 KiB for barriers
    stages = min(left // (2 * TILE_K * (TILE_M + n)), 8)
    return Tiles(n, stages, grain(layout), device.target().cores, out_slots)


def owned(layout):
    """Return the rows [E] from each group's start to the next one's."""
    ends = jnp.concatenate([layout.starts[1:], jnp.full(1, layout.rows, jnp.int32)])
    return ends - layout.starts


def row_items(layout):
    """Return the row tiles in order, used ones first: (items [I, 4] int32, how many [1]).

    Columns: expert, first row, rows to write, and whether a product is needed (else zeros).
    """
    sizes, starts = layout.sizes.astype(jnp.int32), layout.starts
    experts = sizes.shape[0]
    have = owned(layout)
    used = (sizes + (TILE_M - 1)) // TILE_M
    tiles = jnp.maximum((have + (TILE_M - 1)) // TILE_M, used)
    counts = jnp.concatenate([used, tiles - used])
    ends = jnp.cumsum(counts).astype(jnp.int32)
    item = jnp.arange(layout.rows // TILE_M + experts, dtype=jnp.int32)
    # of few entries: all compared at once instead of a loop of searches
    place = (item[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    place = jnp.minimum(place, 2 * experts - 1)
    expert = place % experts
    product = place < experts
    within = item - (ends - counts)[place] + jnp.where(product, 0, used[expert]).astype(jnp.int32)
    offset = within * TILE_M
    rows = jnp.clip(have[expert] - offset, 0, TILE_M)
    table = [expert, starts[expert] + offset, rows, product.astype(jnp.int32)]
    return jnp.stack(table, 1), ends[-1:]


def group_items(layout):
    """Return the groups [E, 4] int32, most rows first, so that long ones do not start last.

    Columns: expert, first row, chunks of TILE_K rows to contract, and the rows that the last of
    them has from this group.
    """
    sizes = layout.sizes.astype(jnp.int32)
    chunks = (sizes + (TILE_K - 1)) // TILE_K
    last = jnp.clip(owned(layout) - (chunks - 1) * TILE_K, 0, TILE_K)
    order = jnp.argsort(-sizes, stable=True).astype(jnp.int32)
    return jnp.stack([order, layout.starts[order], chunks[order], last[order]], 1)


def across(tiles: int) -> int:
    """Return how many column tiles are done for a row tile before the next row tile's.

    A divisor of their number, so that the tiles in flight share both rows and matrices.
    """
    best = max(n for n in range(1, 17) if tiles % n == 0)
    return best if best >= 4 else tiles
