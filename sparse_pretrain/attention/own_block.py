"""Causal attention inside the block of each query, in tiles as long as a block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain.sharding import ops

# A tile's queries read the tile and the one before it, however blocks lie in the row. Measured at
# block 64, a row of 4096, 8 heads on 2 of 64, forward and backward: 32 ms; with the row cut as
# for any window 86, or 59 in blocks of 64 keys.
WIDEST = 128  # block; from there on the tiles of a window are as short
QUERIES = 512  # done at once


def _tiled(length: int, size: int) -> bool:
    return size <= WIDEST and length > QUERIES


def keys_per_query(length: int, size: int) -> float:
    """Keys that a query is multiplied with, on average, as executed. Units: tokens."""
    if not _tiled(length, size):
        return ops.flash_keys_per_query(length, window=size)
    step = QUERIES // size * size
    return 2 * size * (-(-length // step) * step) / length


def own_block(
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxKxD: Float[Array, "B L K D"],
    v_BxLxKxD: Float[Array, "B L K D"],
    ids_BxL: Int[Array, "B L"],
    *,
    size: int,
    scale: float,
) -> tuple[Float[Array, "B L H D"], Float[Array, "B L H"]]:
    """(o, lse) over the tokens of the same number up to the query's own; 0 and -1e30 for number 0.

    Shapes: ids as `blocks.block_ids` gives them, so that a block lies in at most `size` rows.
    """
    q, k, v, L = q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, ids_BxL.shape[1]
    if not _tiled(L, size):
        return ops.flash(q, k, v, segments_q=ids_BxL, scale=scale, window=size, return_lse=True)
    at_once = QUERIES // size
    steps = -(-L // (at_once * size))

    def tiles(x):
        """[B, tiles, size, ...]."""
        x = jnp.pad(x, ((0, 0), (0, steps * at_once * size - L), *((0, 0) for _ in x.shape[2:])))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])

    def in_steps(x):
        """[steps, B x at_once, rows of a tile, ...]."""
        x = x.reshape(x.shape[0], steps, at_once, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(steps, -1, *x.shape[3:])

    def with_before(x):
        x = tiles(x)
        before = jnp.pad(x, ((0, 0), (1, 0), *((0, 0) for _ in x.shape[2:])))[:, :-1]
        return in_steps(jnp.concatenate([before, x], axis=2))

    def attend(part):
        q, k, v, ids_q, ids_k = part
        return ops.flash(q, k, v, segments_q=ids_q, segments_k=ids_k, scale=scale, return_lse=True)

    q, ids_q = (in_steps(tiles(x)) for x in (q, ids_BxL))
    k, v, ids_k = (with_before(x) for x in (k, v, ids_BxL))
    o, lse = jax.lax.map(attend, (q, k, v, ids_q, ids_k))

    def back(x):
        x = x.reshape(steps, ids_BxL.shape[0], at_once, size, *x.shape[3:])
        return jnp.moveaxis(x, 0, 1).reshape(ids_BxL.shape[0], -1, *x.shape[4:])[:, :L]

    return back(o), back(lse)
