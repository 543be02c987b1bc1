"""Sliding-window attention with sinks."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.attention import base, grouped
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(grouped.Config):
    """`window` tokens, the query's own among them; `sinks` adds one learned logit per head.

    Without sinks the parameters are full attention's.
    """

    KIND: ClassVar[str] = "sliding"

    window: int = 256
    sinks: bool = True

    def __post_init__(self):
        super().__post_init__()
        spec.positive(self, "window")
        spec.at_most(self, 2**24, "window")


class Sliding(grouped.Grouped):
    """Causal softmax attention over the last `window` tokens of the document.

    A sink takes part in the softmax and has no value: a head that finds nothing may read nothing.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: Longformer (2004.05150); sinks as learned logits after gpt-oss, cf. 2309.17453.
    """

    Config = Config

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        super().__init__(config, width, keys, out_gain=out_gain)
        if config.sinks:
            self.sinks = nn.param(keys, (config.heads,), ("H",), value=0.0)

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        size = ops.queries_at_once(x.shape[1])
        if size is None or self.config.softcap:
            return super().__call__(x, context)
        return self._by_chunks(x, context, size)

    def parts(self, q, k, v, context: base.Context) -> list[ops.Part]:
        """As `core`, without a cap."""
        del q
        arrays = {"k": k, "v": v, "segments_q": context.segments}
        if self.config.sinks:
            arrays["sinks_H"] = nn.read(self.sinks)
        return [ops.Part("flash", arrays, {"scale": self._scale, "window": self.config.window})]

    def core(self, q, k, v, context: base.Context) -> jax.Array:
        """The window's tokens of the document."""
        c = self.config
        return ops.flash(
            q,
            k,
            v,
            segments_q=context.segments,
            segments_k=context.segments,
            scale=self._scale,
            softcap=c.softcap or None,
            window=c.window,
            sinks_H=nn.read(self.sinks) if c.sinks else None,
        )

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` [] against the last tokens, which lie in a ring."""
        q, k, v = self._step(x_Bx1xD, position)
        ring = cache["k"].shape[1]
        place = jnp.mod(position, ring)
        cache = {
            "k": grouped.append(cache["k"], k, place),
            "v": grouped.append(cache["v"], v, place),
        }
        seen = jnp.mod(place - jnp.arange(ring), ring) <= position  # how far back each place lies
        sinks = nn.read(self.sinks).reshape(q.shape[1:3]) if self.config.sinks else None
        o = self._read(q, cache["k"], cache["v"], seen[None, None, None, :], sinks)
        return self._out(o, x_Bx1xD), cache

    @staticmethod
    def mask(config: Config, context: base.Context):
        """Which keys each query sees, [B, L, L]."""
        return base.causal_mask(context, config.window)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`."""
        H, _, Dh = config.sizes(width)
        return base.core_work(
            Sliding.linear_work(config, width), H, Dh, Dh, length, window=config.window
        )

    @staticmethod
    def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds: no more than the window."""
        return grouped.Grouped.cache_shapes(config, width, batch, min(length, config.window))

    @staticmethod
    def kv_elements(config: Config, width: int) -> int:
        """Cache elements per token: none, a window is of one size."""
        del config, width
        return 0
