"""Causal attention inside the block of each query, in tiles as long as a block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.flash import xla

# A tile's queries read the tile and the one before it, however blocks lie in the row. Measured at
# block 64, a row of 4096, 8 heads on 2 of 64, forward and backward: 32 ms; with the row cut as
# for any window 86, or 59 in blocks of 64 keys.
WIDEST = 128  # block; from there on the tiles of a window are as short
QUERIES = 512  # done at once


def _tiled(length: int, size: int) -> bool:
    return size <= WIDEST and length > QUERIES


def keys_per_query(length: int, size: int) -> float:
    """Return how many keys a query is multiplied with, on average, as executed. Units: tokens."""
    if not _tiled(length, size):
        return xla.keys_per_query(length, window=size)
    step = QUERIES // size * size
    return 2 * size * (-(-length // step) * step) / length


class _Tiles:
    """How the rows of a call are cut: steps of tiles of `size` rows each.

    `first` is the row of query 0, None where that is 0.
    """

    def __init__(self, B, L, S, size, first):
        self.B, self.L, self.S, self.size, self.first = B, L, S, size, first
        self.at_once = QUERIES // size
        self.steps = -(-L // (self.at_once * size))
        self.rows = self.steps * self.at_once * size

    def _in_steps(self, x):
        """[steps, B x at_once, rows of a tile, ...] of [B, tiles, rows of a tile, ...]."""
        x = x.reshape(self.B, self.steps, self.at_once, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(self.steps, -1, *x.shape[3:])

    def queries(self, x, fill=0):
        """Tiles of what belongs to queries, [B, L, ...]."""
        more = ((0, 0) for _ in x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, self.rows - self.L), *more), constant_values=fill)
        return self._in_steps(x.reshape(self.B, -1, self.size, *x.shape[2:]))

    def _spare(self):
        """Rows that are added before and behind the keys."""
        return self.size, self.rows if self.first is not None else max(self.rows - self.S, 0)

    def keys(self, x):
        """Tiles of what belongs to keys, [B, S, ...], each with the tile before it."""
        x = jnp.pad(x, ((0, 0), self._spare(), *((0, 0) for _ in x.shape[2:])))
        start = 0 if self.first is None else self.first
        x = lax.dynamic_slice_in_dim(x, start, self.rows + self.size, 1)
        x = x.reshape(self.B, -1, self.size, *x.shape[2:])
        return self._in_steps(jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2))

    def _out_of_steps(self, x):
        x = x.reshape(self.steps, self.B, self.at_once, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(self.B, -1, *x.shape[3:])

    def of_queries(self, x):
        """Undo `queries`."""
        x = self._out_of_steps(x)
        return x.reshape(self.B, self.rows, *x.shape[3:])[:, :self.L]

    def of_keys(self, x):
        """Add up what `keys` gave out twice, [B, S, ...]."""
        x = self._out_of_steps(x)
        before, own = x[:, :, :self.size], x[:, :, self.size:]
        rest = ((0, 0),) * (x.ndim - 2)
        total = jnp.pad(before, ((0, 0), (0, 1), *rest)) + jnp.pad(own, ((0, 0), (1, 0), *rest))
        total = total.reshape(self.B, self.rows + self.size, *x.shape[3:])
        if self.first is not None:
            empty = jnp.zeros((self.B, sum(self._spare()) + self.S, *x.shape[3:]), x.dtype)
            total = lax.dynamic_update_slice_in_dim(empty, total, self.first, 1)
        return total[:, self.size:self.size + self.S]


def own_block(q_BxLxHxD, k_BxSxKxD, v_BxSxKxD, ids_q, ids_k, *, size, scale, first=None):
    """Return (o, lse) over the tokens of the same number up to the query's own.

    Numbers run along a row so that a block lies in at most `size` rows; 0 is padding, whose rows
    are 0 and their lse -1e30. `first` is the row of query 0 where the queries are a part of a row.

    Shapes: q [B, L, H, D], k and v [B, S, K, D], ids int [B, L] and [B, S].
    Units: size in tokens.
    """
    q, k, v = q_BxLxHxD, k_BxSxKxD, v_BxSxKxD
    (B, L), S = q.shape[:2], k.shape[1]
    if not _tiled(L, size):
        return xla.flash(q, k, v, segments_q=ids_q, segments_k=ids_k, scale=scale, window=size,
                         first=first, return_lse=True)
    tiles = _Tiles(B, L, S, size, first)

    def attend(part):
        q, k, v, ids_q, ids_k = part
        return xla.flash(q, k, v, segments_q=ids_q, segments_k=ids_k, scale=scale,
                         return_lse=True)

    parts = (tiles.queries(q), tiles.keys(k), tiles.keys(v), tiles.queries(ids_q),
             tiles.keys(ids_k))
    o, lse = jax.lax.map(attend, parts)
    return tiles.of_queries(o), tiles.of_queries(lse)


def part_gradients(q_BxLxHxD, k_BxSxKxD, v_BxSxKxD, ids_q, ids_k, do_BxLxHxD, lse_BxLxH,
                   delta_BxLxH, *, size, scale, first=None, dtype=None):
    """Return dq, dk and dv of this part in a softmax over these keys and others.

    Shapes: as of `own_block`; lse, delta and the gradients' dtype as of `xla.part_gradients`.
    """
    q, k, v, do = q_BxLxHxD, k_BxSxKxD, v_BxSxKxD, do_BxLxHxD
    (B, L), S = q.shape[:2], k.shape[1]
    if not _tiled(L, size):
        return xla.part_gradients(q, k, v, do, lse_BxLxH, delta_BxLxH, segments_q=ids_q,
                                  segments_k=ids_k, scale=scale, window=size, first=first,
                                  dtype=dtype)
    tiles = _Tiles(B, L, S, size, first)

    def gradients(part):
        q, k, v, ids_q, ids_k, do, lse, delta = part
        return xla.part_gradients(q, k, v, do, lse, delta, segments_q=ids_q, segments_k=ids_k,
                                  scale=scale, dtype=dtype)

    parts = (tiles.queries(q), tiles.keys(k), tiles.keys(v), tiles.queries(ids_q),
             tiles.keys(ids_k), tiles.queries(do), tiles.queries(lse_BxLxH),
             tiles.queries(delta_BxLxH))
    dq, dk, dv = jax.lax.map(gradients, parts)
    return tiles.of_queries(dq), tiles.of_keys(dk), tiles.of_keys(dv)
