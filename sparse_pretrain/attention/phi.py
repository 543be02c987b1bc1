"""The compressing network of native sparse attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn
from sparse_pretrain.attention import blocks
from sparse_pretrain.attention.compressor import in_blocks
from sparse_pretrain.sharding import ops


class Compressor(nn.Module):
    """One vector for `span` tokens: an MLP of them side by side, each with what marks its place.

    Heads share it. The first product is written stride by stride, so that overlapping entries
    read no token twice.

    Source: NSA (2502.11089), equation 7.
    """

    def __init__(self, span: int, stride: int, dim: int, hidden: int, keys: nn.Keys):
        self.span, self.stride = span, stride
        self.w_in = nn.param(
            keys, (span * dim, hidden), ("Dc", "F"), std=(span * dim) ** -0.5
        )
        self.w_out = nn.param(keys, (hidden, dim), ("F", "Dh"), std=hidden**-0.5)
        # [span, dim] in one dim: to an optimizer it is a bias and no matrix
        self.place = nn.param(keys, (span * dim,), ("Dc",), value=0.0)

    def _bias(self, dtype):
        place = nn.read(self.place).astype(dtype)[None]
        return ops.linear(place, nn.read(self.w_in, place.dtype))[0]

    def _out(self, hidden):
        return ops.linear(jax.nn.silu(hidden), nn.read(self.w_out, hidden.dtype))

    def __call__(
        self, x: Float[Array, "B L K D"], chunks: blocks.Layout
    ) -> Float[Array, "B M K D"]:
        """Entries in the slots of whole strides; those of unused slots mean nothing."""
        B, L, K, D = x.shape
        d, R = self.stride, self.span // self.stride
        x = in_blocks(x.reshape(B, L, K * D), chunks, d)
        M = x.shape[1]
        x = x.reshape(B, M, d, K, D).transpose(0, 1, 3, 2, 4).reshape(B, M, K, d * D)
        w = nn.read(self.w_in, x.dtype).reshape(R, d * D, -1).transpose(1, 0, 2)
        parts = ops.linear(x, w)
        total = jnp.reshape(self._bias(x.dtype), (1, 1, 1, -1))
        for r in range(R):
            later = jnp.pad(parts[:, r:, :, r], ((0, 0), (0, min(r, M)), (0, 0), (0, 0)))
            total = total + later
        return self._out(total)

    def one(self, x_BxlxKxD) -> Float[Array, "B K D"]:
        """The entry of these tokens."""
        B, S, K, D = x_BxlxKxD.shape
        x = x_BxlxKxD.transpose(0, 2, 1, 3).reshape(B, K, S * D)
        hidden = ops.linear(x, nn.read(self.w_in, x.dtype))
        return self._out(hidden + self._bias(x.dtype).reshape(1, 1, -1))
