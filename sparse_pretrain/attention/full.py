"""Full causal attention with grouped keys, QK-norm, logit softcap and rotary positions."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_pretrain.attention import base, grouped
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(grouped.Config):
    """`kv_heads=0` means one key head per query head, `head_dim=0` width over heads."""

    KIND: ClassVar[str] = "full"


class Full(grouped.Grouped):
    """Causal softmax attention over the whole document.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: grouped-query attention 2305.13245; QK-norm 2302.05442.
    """

    Config = Config

    def core(self, q, k, v, context: base.Context) -> jax.Array:
        """Every earlier token of the document."""
        return ops.flash(
            q,
            k,
            v,
            segments_q=context.segments,
            segments_k=context.segments,
            scale=self._scale,
            softcap=self.config.softcap or None,
        )

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` [] against the cache; equal to the parallel forward."""
        q, k, v = self._step(x_Bx1xD, position)
        cache = {
            "k": grouped.append(cache["k"], k, position),
            "v": grouped.append(cache["v"], v, position),
        }
        seen = jnp.arange(cache["k"].shape[1]) <= position
        o = self._read(q, cache["k"], cache["v"], seen[None, None, None, :])
        return self._out(o, x_Bx1xD), cache

    @staticmethod
    def mask(config: Config, context: base.Context):
        """Which keys each query sees, [B, L, L]."""
        del config
        return base.causal_mask(context)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`."""
        H, _, Dh = config.sizes(width)
        return base.core_work(Full.linear_work(config, width), H, Dh, Dh, length)
