"""Compressed entries: one key for a block of tokens, pooled channel by channel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn
from sparse_pretrain.attention import blocks
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops


def halves(w: jax.Array, config: layers.RopeConfig, rotated: int, axis: int = -1) -> jax.Array:
    """A weight whose last `rotated` entries along `axis` are turned, ready for turning by halves.

    What is read from entries in this order must be reordered the same way.
    """
    if not config.interleaved or not rotated:
        return w
    start = w.shape[axis] - rotated
    plain = jax.lax.slice_in_dim(w, 0, start, axis=axis)
    turned = jnp.moveaxis(jax.lax.slice_in_dim(w, start, w.shape[axis], axis=axis), axis, -1)
    return jnp.concatenate([plain, jnp.moveaxis(layers.half_split(turned), -1, axis)], axis=axis)


def turn(x_BxLxHxD, positions_BxL, config: layers.RopeConfig, rotated: int):
    """x with its last `rotated` dims, by halves, turned by their positions; back where negative."""
    if not rotated:
        return x_BxLxHxD
    config = dataclasses.replace(config, interleaved=False)
    return layers.rope(x_BxLxHxD, positions_BxL, config, start=x_BxLxHxD.shape[-1] - rotated)


@jax.custom_vjp
def _gather(x_BxLxD, index_BxR, inverse_BxL):
    """Rows of x by index, 0 where that is -1; no row is named twice, and inverse names it back."""
    rows = jnp.take_along_axis(x_BxLxD, jnp.maximum(index_BxR, 0)[:, :, None], axis=1)
    return jnp.where(index_BxR[:, :, None] >= 0, rows, jnp.zeros_like(rows))


# the transpose of taking rows is taking them back, which is no scattered sum
_gather.defvjp(
    lambda x, index, inverse: (_gather(x, index, inverse), (index, inverse)),
    lambda kept, dy: (_gather(dy, kept[1], kept[0]), None, None),
)


def in_blocks(
    x: Float[Array, "B L D"], layout: blocks.Layout, size: int
) -> Float[Array, "B M size D"]:
    """The tokens of each entry of a layout without overlap, 0 in unused slots."""
    B, L, D = x.shape
    M = layout.starts.shape[1]
    used = layout.segments != 0
    offset = jnp.arange(size, dtype=jnp.int32)
    index = jnp.where(used[:, :, None], layout.starts[:, :, None] + offset[None, None, :], -1)
    rows = jnp.arange(L, dtype=jnp.int32)
    # unused slots end past the row, so the ends are in order
    slot = jax.vmap(functools.partial(jnp.searchsorted, v=rows))(layout.ends).astype(jnp.int32)
    at = jnp.minimum(slot, M - 1)
    start = jnp.take_along_axis(layout.starts, at, axis=1)
    inside = (slot < M) & jnp.take_along_axis(used, at, axis=1) & (rows[None] >= start)
    inverse = jnp.where(inside, at * size + rows[None] - start, -1)
    return _gather(x, index.reshape(B, M * size), inverse).reshape(B, M, size, D)


class Compressor(nn.Module):
    """Pools each block of `ratio` tokens by a softmax over tokens for every channel.

    With `overlap` a block also pools the block before it, through features of its own: the first
    half of each projection's; a document's first block has none before it.

    Shapes: x [B, L, D] -> entries [B, L // ratio, C], normed, turned by their first token's place.
    Source: DeepSeek-V4 (2606.19348), equations of CSA and HCA; feature order as in its release.
    """

    def __init__(
        self, width: int, dim: int, keys: nn.Keys, *, ratio: int, overlap: bool,
        rope: layers.RopeConfig, rotated: int, eps: float,
    ):
        self.ratio, self.dim, self.rope, self.rotated = ratio, dim, rope, rotated
        self.streams = 2 if overlap else 1
        C = self.streams * dim
        self.w_kv = nn.param(keys, (width, C), ("D", "Dc"), std=width**-0.5)
        self.w_gate = nn.param(keys, (width, C), ("D", "Dc"), std=width**-0.5)
        # [ratio, C] in one dim: to an optimizer it is a bias and no matrix
        self.bias = nn.param(keys, (ratio * C,), ("Dc",), value=0.0)
        self.norm = layers.RMSNorm(dim, keys, eps=eps, dim="Dc")

    def _halves(self, w):
        each = w.reshape(*w.shape[:-1], self.streams, self.dim)
        return halves(each, self.rope, self.rotated).reshape(w.shape)

    def _project(self, x):
        """Values and logits of tokens, side by side: [..., 2, streams, C]."""
        both = [ops.linear(x, self._halves(nn.read(w, x.dtype))) for w in (self.w_kv, self.w_gate)]
        return jnp.stack(both, axis=-2).reshape(*x.shape[:-1], 2, self.streams, self.dim)

    def _biases(self, dtype):
        """What is added to the logits of a block's tokens: [R, S, C]."""
        bias = self._halves(nn.read(self.bias).reshape(self.ratio, -1)).astype(layers.wide(dtype))
        return bias.reshape(self.ratio, self.streams, self.dim)

    def _finish(self, pooled_BxMxC, positions_BxM):
        scale = halves(nn.read(self.norm.scale), self.rope, self.rotated)
        entries = layers.rms_norm(pooled_BxMxC, scale, self.norm.eps)
        return turn(entries[:, :, None], positions_BxM, self.rope, self.rotated)[:, :, 0]

    def __call__(self, x, layout: blocks.Layout, positions_BxL):
        """Entries of a row's layout; those of unused slots mean nothing."""
        own = self._project(in_blocks(x, layout, self.ratio))
        positions = jnp.take_along_axis(positions_BxL, layout.starts, axis=1)
        return self._finish(ops.compress(own, self._biases(own.dtype), positions > 0), positions)

    def step(self, x_Bx1xD, tail, entries, position):
        """The token at `position` added to (tail, entries) of a cache; an entry once it is whole.

        Shapes: tail [B, streams x ratio, 2 x streams x C], entries [B, M, C].
        """
        B, R, M = x_Bx1xD.shape[0], self.ratio, entries.shape[1]
        new = self._project(x_Bx1xD).reshape(B, 1, -1)
        place = jnp.mod(position, tail.shape[1])
        tail = jax.lax.dynamic_update_slice_in_dim(tail, new, place, 1)
        if not M:
            return tail, entries
        held = tail.reshape(B, self.streams, R, 2, self.streams, self.dim)
        block = position // R
        own = jax.lax.dynamic_slice_in_dim(held, jnp.mod(block, self.streams), 1, 1)
        before = jax.lax.dynamic_slice_in_dim(held, jnp.mod(block + 1, self.streams), 1, 1)
        pooled = ops.pool(own, before, self._biases(own.dtype), jnp.full((B, 1), block > 0))
        entry = self._finish(pooled, jnp.full((B, 1), block * R, jnp.int32))
        # a block beyond the cache is never whole; its place is clamped to the last
        at = jnp.minimum(block, M - 1)
        whole = jnp.mod(position, R) == R - 1
        old = jax.lax.dynamic_slice_in_dim(entries, at, 1, 1)
        entry = jnp.where(whole, entry, old)
        return tail, jax.lax.dynamic_update_slice_in_dim(entries, entry, at, 1)

    @staticmethod
    def cache_shapes(dim: int, ratio: int, overlap: bool, batch: int, length: int) -> tuple:
        """Shapes of (tail, entries) in a cache of `length` tokens."""
        streams = 2 if overlap else 1
        return (batch, streams * ratio, 2 * streams * dim), (batch, length // ratio, dim)
