"""One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base, full
from sparse_pretrain.model import ffn, layers
from sparse_pretrain.routing.base import Report
from sparse_pretrain.shapes import AnyArray, Position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """An attention section and a feed-forward section, each chosen by its `kind`."""

    attention: spec.Config = full.Config()
    ffn: spec.Config = ffn.DenseConfig()


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    Shapes: x [B, L, D] -> (x [B, L, D], the feed-forward layer's Report, the attention's own loss
        [], a mean over tokens that are not padding).
    """

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, eps: float, out_gain: float):
        self.norm_attention = layers.RMSNorm(width, keys, eps=eps)
        mixer = attention.TABLE[config.attention.KIND]
        self.attention = mixer(config.attention, width, keys, out_gain=out_gain)
        self.norm_ffn = layers.RMSNorm(width, keys, eps=eps)
        self.ffn = ffn.TABLE[config.ffn.KIND](config.ffn, width, keys, out_gain=out_gain)

    def __call__(
        self, x: Float[Array, "B L D"], context: base.Context
    ) -> tuple[Float[Array, "B L D"], Report, Float[Array, ""]]:
        valid = context.segments != 0
        y, own = self.attention.attend(self.norm_attention(x), context)
        x = x + y
        loss = jnp.zeros((), jnp.float32)
        if own is not None:
            counted = valid.astype(jnp.float32)
            loss = jnp.sum(own.astype(jnp.float32) * counted)
            loss = loss / jnp.maximum(jnp.sum(counted), 1.0)
        y, report = self.ffn(self.norm_ffn(x), valid, context.tokens, train=context.train)
        return x + y, report, loss

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: base.Cache,
        position: Position,
        tokens: Int[AnyArray, "B 1"],
    ) -> tuple[Float[Array, "B 1 D"], base.Cache]:
        """One token [B, 1, D] against the layer's cache."""
        y, cache = self.attention.decode(self.norm_attention(x), cache, position)
        x = x + y
        y, _ = self.ffn(self.norm_ffn(x), tokens == tokens, tokens)
        return x + y, cache
