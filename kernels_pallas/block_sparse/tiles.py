"""Pairs of a query row and a chosen block, sorted by block and cut into tiles of one block each.

As tokens are sorted by expert in a mixture of experts: a block's keys are read once for all the
queries of a tile, and never gathered per query. Letters beside the house's: P pairs, E groups (a
block of one key head), Z tiles, T pairs of a tile, R query heads of a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp


class Tiles(NamedTuple):
    """Where every pair is computed. A slot is a place of a tile: tile * T + offset.

    `group` [Z] of each tile; `row` [Z, T], the query row of each slot, the number of rows where
    there is none; `slot` [rows, N] of each pair, Z * T where it chooses nothing; `used` tiles.
    """

    group: jnp.ndarray
    row: jnp.ndarray
    slot: jnp.ndarray
    used: jnp.ndarray


def bound(pairs, groups, size):
    """Return the most tiles that any choice can need."""
    return (pairs + min(groups, pairs) * (size - 1)) // size


def distinct(blocks_xN, count):
    """Return the choices with -1 for what is outside [0, count) or a repetition."""
    N = blocks_xN.shape[-1]
    earlier = jnp.arange(N)[:, None] > jnp.arange(N)[None, :]
    earlier = earlier.reshape((1,) * (blocks_xN.ndim - 1) + (N, N))
    again = ((blocks_xN[..., :, None] == blocks_xN[..., None, :]) & earlier).any(-1)
    none = again | (blocks_xN < 0) | (blocks_xN >= count)
    return jnp.where(none, -1, blocks_xN.astype(jnp.int32))


def cut(group_RxN, groups, size, multiple, method="scan"):
    """Cut the pairs into tiles of `size`, a whole number of `multiple` of them.

    Shapes: group int32 [rows, N], the pair's group or `groups` for none. `method` is that of
    `jnp.searchsorted`: a GPU launches every step of a loop, and wants it unrolled.
    """
    i32 = jnp.int32
    rows, N = group_RxN.shape
    pairs = rows * N
    Z = -(-bound(pairs, groups, size) // multiple) * multiple
    group_P = group_RxN.reshape(-1)
    order_P = jnp.argsort(group_P, stable=True).astype(i32)
    sorted_P = group_P[order_P]
    ends_E = jnp.searchsorted(sorted_P, jnp.arange(groups, dtype=i32), side="right",
                              method=method).astype(i32)
    sizes_E = jnp.diff(ends_E, prepend=jnp.zeros(1, i32))
    first_E = ends_E - sizes_E
    tiles_E = (sizes_E + (size - 1)) // size
    ends_of_tiles_E = jnp.cumsum(tiles_E, dtype=i32)
    first_tile_E = ends_of_tiles_E - tiles_E

    group_Z = jnp.searchsorted(ends_of_tiles_E, jnp.arange(Z, dtype=i32), side="right",
                               method=method)
    group_Z = jnp.minimum(group_Z.astype(i32), groups - 1)
    offset_Z = (jnp.arange(Z, dtype=i32) - first_tile_E[group_Z]) * size
    offset_ZxT = offset_Z[:, None] + jnp.arange(size, dtype=i32)[None, :]
    used_ZxT = offset_ZxT < sizes_E[group_Z][:, None]
    at_ZxT = jnp.where(used_ZxT, first_E[group_Z][:, None] + offset_ZxT, 0)
    row_ZxT = jnp.where(used_ZxT, order_P[at_ZxT] // N, rows)

    known_P = jnp.minimum(sorted_P, groups - 1)
    slot_P = first_tile_E[known_P] * size + jnp.arange(pairs, dtype=i32) - first_E[known_P]
    slot_P = jnp.where(sorted_P < groups, slot_P, Z * size)
    slot_P = jnp.zeros(pairs, i32).at[order_P].set(slot_P, unique_indices=True)
    return Tiles(group_Z, row_ZxT, slot_P.reshape(rows, N), ends_of_tiles_E[-1])
