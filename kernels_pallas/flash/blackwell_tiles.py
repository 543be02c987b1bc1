"""How Blackwell's kernels of flash go through their tiles (kernels_pallas/blackwell_attention.py).

Arrays lie as they are given, and steps come from the same tables, as on Hopper (gpu_tiles.py). The
two computing warpgroups have a tile of 128 rows each and the same steps, or one tile and every
other step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import blackwell_attention
from kernels_pallas.blackwell_attention import Tile
from kernels_pallas.blackwell_scores import ROWS, STEP
from kernels_pallas.flash import gpu_tiles
from kernels_pallas.hopper import i32


class At(NamedTuple):
    """Batch row, head and tile; the first step it meets and how many in a turn, and its edges."""

    b: Any
    head: Any
    number: Any
    low: Any
    span: Any
    edges: Any


def over_tiles(attend, products, edges, fixed, streamed, outs, *, both, turns=1, heads=1,
               scalars=(), **memory):
    """A kernel that calls `attend` for every tile of `fixed` arrays' rows, head by head.

    Arguments as of gpu_tiles.over_tiles; `both`: two tiles of queries at a time meet the same
    steps. attend(at, row, own, scalars) is told its first row, and `own` and what it returns are
    those of blackwell_attention.over_tiles, as `products` and `memory` are.
    """
    B, rows, lanes = fixed[0].shape[:3]
    size = ROWS * (1 + both)
    tiles = rows // size

    def decode(scalars, number):
        """The last tiles first, which see most where it is causal."""
        edges = scalars[0]
        tile = lax.div(number, i32(B * lanes))
        lane = number - tile * (B * lanes)
        b, tile = lax.div(lane, i32(lanes)), (tiles - 1) - tile
        known = [edges[b, tile, n] for n in range(edges.shape[2])]
        span = known[-1] - known[0]
        return Tile(span * turns, At(b, lane - b * lanes, tile, known[0], span, known))

    def rows_at(at, ref):
        return gpu_tiles.part(ref, at.b, at.head, at.number * size, size)

    def step_at(at, k, ref):
        turn = lax.div(k, at.span) if turns > 1 else 0
        head = lax.div(at.head, i32(heads)) * turns + turn
        return gpu_tiles.part(ref, at.b, head, (at.low + k - turn * at.span) * STEP, STEP)

    def first_row(at, place):
        return at.number * size + (place * ROWS if both else 0)

    def out_at(at, place, ref, columns):
        row = first_row(at, place)
        if columns is None:
            return gpu_tiles.part(ref, at.b, at.head, row, ROWS)
        return ref.at[at.b, pl.ds(pl.multiple_of(row, ROWS), ROWS), at.head, columns]

    def attend_tile(tile, own, scalars):
        return attend(tile.at, first_row(tile.at, own.place), own, scalars[1:])

    return blackwell_attention.over_tiles(
        attend_tile, products, decode, fixed, streamed,
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), x.shape[3] if x.ndim == 4 else 1) for x in outs],
        rows_at=rows_at, step_at=step_at, out_at=out_at, total=lambda _: i32(B * lanes * tiles),
        apart=both, both=both, scalars=[edges, *scalars], **memory)
