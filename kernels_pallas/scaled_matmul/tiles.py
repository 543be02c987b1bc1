"""Rounding to E4M3 with a scale per tile: in float32 whatever the input, so that all agree.

And where the tiles of rows lie when they are counted from a group's start.
"""

from __future__ import annotations

import jax.numpy as jnp

TILE = 128
ROW, BLOCK, COLUMN = (1, TILE), (TILE, TILE), (TILE, 1)
LARGEST = 448.0  # of E4M3; what is larger becomes nan
E4M3 = jnp.float8_e4m3fn


def whole(n: int, unit: int = TILE) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


def _tiles(x, shape):
    """Cut the last two dims in tiles: [..., rows, height, columns, width], zeros at the ends."""
    spare = [-n % t for n, t in zip(x.shape[-2:], shape, strict=True)]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in spare])
    (R, C), (h, w) = x.shape[-2:], shape
    return x.reshape(*x.shape[:-2], R // h, h, C // w, w)


def spread(scale, shape, like):
    """Return a scale per element of `like`'s last two dims."""
    wide = jnp.repeat(jnp.repeat(scale, shape[0], axis=-2), shape[1], axis=-1)
    return wide[..., :like[-2], :like[-1]]


def scale_of(largest, power_of_two):
    """Return the scales of tiles whose largest magnitudes these are."""
    scale = largest * jnp.float32(1 / LARGEST)
    if power_of_two:
        part, exponent = jnp.frexp(scale)  # part in [1/2, 1)
        scale = jnp.ldexp(jnp.ones_like(scale), exponent - (part == 0.5).astype(exponent.dtype))
    # a scale under the normal numbers would lose the bits it is to keep
    scale = jnp.maximum(scale, jnp.float32(2.0**-126))
    return jnp.where(largest == 0, jnp.ones_like(scale), scale)


def rounded(x32, scale):
    """Return x over its scales in E4M3."""
    return jnp.clip(x32 / scale, -LARGEST, LARGEST).astype(E4M3)


def quantize(x, shape, power_of_two=False):
    """Return x over its scales in E4M3, and the float32 scales of tiles of the last two dims.

    Shapes: x [..., M, N], tiles of shape (h, w) -> [..., M, N] and [..., M/h, N/w], rounded up. A
    tile of zeros has scale 1; one with an infinity or nan becomes nan.
    """
    x32 = x.astype(jnp.float32)
    scale = scale_of(jnp.abs(_tiles(x32, shape)).max((-3, -1)), power_of_two)
    return rounded(x32, spread(scale, shape, x.shape)), scale


def dequantize(q, scale, shape, dtype=jnp.float32):
    """Return the numbers that stand for E4M3 numbers and the scales of their tiles."""
    return q.astype(dtype) * spread(scale, shape, q.shape).astype(dtype)


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
