"""One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

import dataclasses

from jaxtyping import Array, Float

from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base, full
from sparse_pretrain.model import ffn, layers
from sparse_pretrain.shapes import Position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """An attention section and a feed-forward section, each chosen by its `kind`."""

    attention: spec.Config = full.Config()
    ffn: spec.Config = ffn.DenseConfig()


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    Shapes: x [B, L, D] -> (x [B, L, D], load [E], balance []).
    """

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, eps: float, out_gain: float):
        self.norm_attention = layers.RMSNorm(width, keys, eps=eps)
        mixer = attention.TABLE[config.attention.KIND]
        self.attention = mixer(config.attention, width, keys, out_gain=out_gain)
        self.norm_ffn = layers.RMSNorm(width, keys, eps=eps)
        self.ffn = ffn.TABLE[config.ffn.KIND](config.ffn, width, keys, out_gain=out_gain)

    def __call__(
        self, x: Float[Array, "B L D"], context: base.Context
    ) -> tuple[Float[Array, "B L D"], Float[Array, " E"], Float[Array, ""]]:
        x = x + self.attention(self.norm_attention(x), context)
        y, load, balance = self.ffn(self.norm_ffn(x), context.segments != 0)
        return x + y, load, balance

    def decode(
        self, x: Float[Array, "B 1 D"], cache: base.Cache, position: Position
    ) -> tuple[Float[Array, "B 1 D"], base.Cache]:
        """One token [B, 1, D] against the layer's cache."""
        y, cache = self.attention.decode(self.norm_attention(x), cache, position)
        x = x + y
        y, _, _ = self.ffn(self.norm_ffn(x), x[..., 0] == x[..., 0])
        return x + y, cache
