"""One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base, full
from sparse_pretrain.model import ffn, layers, residual
from sparse_pretrain.routing.base import Report
from sparse_pretrain.shapes import AnyArray, Position
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """An attention section and a feed-forward section, each chosen by its `kind`.

    `conv` tokens, the query's own among them, that a short convolution mixes before attention;
    0 for none.
    """

    attention: spec.Config = full.Config()
    ffn: spec.Config = ffn.DenseConfig()
    conv: int = 0

    def __post_init__(self):
        spec.require(0 <= self.conv <= 64, f"conv: must be 0 to 64, got {self.conv}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); attention may see conv(norm(x)) instead.

    With several residual streams R, a site of model/residual.py stands in for each sum.

    Shapes: x [B, L, D] or [B, L, R, D] -> (x alike, the feed-forward layer's Report, the
        attention's own loss [], a mean over tokens that are not padding).
    """

    def __init__(
        self,
        config: Config,
        width: int,
        keys: nn.Keys,
        *,
        eps: float,
        out_gain: float,
        streams: spec.Config = residual.PLAIN,
    ):
        self.norm_attention = layers.RMSNorm(width, keys, eps=eps)
        if config.conv:
            self.conv = layers.ShortConv(config.conv, width, keys)
        self.convolves = config.conv > 0
        mixer = attention.TABLE[config.attention.KIND]
        self.attention = mixer(config.attention, width, keys, out_gain=out_gain)
        self.norm_ffn = layers.RMSNorm(width, keys, eps=eps)
        self.ffn = ffn.TABLE[config.ffn.KIND](config.ffn, width, keys, out_gain=out_gain)
        self.mixes = streams.KIND == "mhc"
        if isinstance(streams, residual.MHCConfig):
            self.site_attention = residual.Site(streams, width, keys, eps=eps)
            self.site_ffn = residual.Site(streams, width, keys, eps=eps)

    def _open(self, site: str, x):
        """(what the layer of this site reads, what its output is added to)."""
        return getattr(self, f"site_{site}").open(x) if self.mixes else (x, x)

    def _close(self, site: str, held, y):
        if self.mixes:
            return ops.laid(getattr(self, f"site_{site}").close(held, y), "BL.D")
        return ops.laid(held + y, "BLD")

    def __call__(
        self, x: Float[Array, "B L *R D"], context: base.Context
    ) -> tuple[Float[Array, "B L *R D"], Report, Float[Array, ""]]:
        valid = context.segments != 0 if context.valid is None else context.valid
        inner, held = self._open("attention", x)
        y = self.norm_attention(inner)
        if self.convolves:
            y = self.conv(y, context.segments)
        y, own = self.attention.attend(y, context)
        x = self._close("attention", held, y)
        loss = jnp.zeros((), jnp.float32)
        if own is not None:
            counted = valid.astype(jnp.float32)
            loss = jnp.sum(own.astype(jnp.float32) * counted)
            loss = loss / jnp.maximum(jnp.sum(counted), 1.0)
        inner, held = self._open("ffn", x)
        y, report = self.ffn(self.norm_ffn(inner), valid, context.tokens, train=context.train)
        return self._close("ffn", held, y), report, loss

    def decode(
        self,
        x: Float[Array, "B 1 *R D"],
        cache: base.Cache,
        position: Position,
        tokens: Int[AnyArray, "B 1"],
    ) -> tuple[Float[Array, "B 1 *R D"], base.Cache]:
        """One token [B, 1, D] or [B, 1, R, D] against the layer's cache."""
        inner, held = self._open("attention", x)
        y, past = self.norm_attention(inner), {}
        if self.convolves:
            y, past["conv"] = self.conv.decode(y, cache["conv"])
        cache = {name: kept for name, kept in cache.items() if name != "conv"}
        y, cache = self.attention.decode(y, cache, position)
        x = self._close("attention", held, y)
        inner, held = self._open("ffn", x)
        y, _ = self.ffn(self.norm_ffn(inner), tokens == tokens, tokens)
        return self._close("ffn", held, y), cache | past


def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
    """What the layer's cache of `length` tokens holds."""
    mixer = attention.TABLE[config.attention.KIND]
    shapes = mixer.cache_shapes(config.attention, width, batch, length)
    return shapes | ({"conv": (batch, config.conv - 1, width)} if config.conv else {})
