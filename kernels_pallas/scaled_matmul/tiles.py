"""Rounding to E4M3 with a scale per tile: in float32 whatever the input, so that all agree."""

from __future__ import annotations

import jax.numpy as jnp

TILE = 128
LARGEST = 448.0  # of E4M3; what is larger becomes nan
E4M3 = jnp.float8_e4m3fn


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


def quantize(x, shape, power_of_two=False):
    """Return x over its scales in E4M3, and the float32 scales of tiles of the last two dims.

    Shapes: x [..., M, N], tiles of shape (h, w) -> [..., M, N] and [..., M/h, N/w], rounded up. A
    tile of zeros has scale 1; one with an infinity or nan becomes nan.
    """
    x32 = x.astype(jnp.float32)
    largest = jnp.abs(_tiles(x32, shape)).max((-3, -1))
    scale = largest * jnp.float32(1 / LARGEST)
    if power_of_two:
        part, exponent = jnp.frexp(scale)  # part in [1/2, 1)
        scale = jnp.ldexp(jnp.ones_like(scale), exponent - (part == 0.5).astype(exponent.dtype))
    # a scale under the normal numbers would lose the bits it is to keep
    scale = jnp.maximum(scale, jnp.float32(2.0**-126))
    scale = jnp.where(largest == 0, jnp.ones_like(scale), scale)
    over = jnp.clip(x32 / spread(scale, shape, x.shape), -LARGEST, LARGEST)
    return over.astype(E4M3), scale


def dequantize(q, scale, shape, dtype=jnp.float32):
    """Return the numbers that stand for E4M3 numbers and the scales of their tiles."""
    return q.astype(dtype) * spread(scale, shape, q.shape).astype(dtype)
