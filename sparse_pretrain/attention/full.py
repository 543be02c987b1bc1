"""Full causal attention with grouped keys, QK-norm, logit softcap and rotary positions."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.attention import base
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`kv_heads=0` means one key head per query head, `head_dim=0` width over heads."""

    KIND: ClassVar[str] = "full"

    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = True
    softcap: float = 0.0
    rope: layers.RopeConfig = layers.RopeConfig()

    def __post_init__(self):
        spec.positive(self, "heads")
        spec.at_most(self, 2**16, "heads", "kv_heads", "head_dim")
        spec.require(self.kv_heads >= 0, f"kv_heads: must not be negative, got {self.kv_heads}")
        spec.require(
            self.heads % (self.kv_heads or self.heads) == 0,
            f"heads: {self.heads} is not a multiple of kv_heads {self.kv_heads}",
        )
        spec.require(
            self.head_dim >= 0 and self.head_dim % 2 == 0,
            f"head_dim: must be even and not negative, got {self.head_dim}",
        )
        spec.require(self.softcap >= 0, f"softcap: must not be negative, got {self.softcap}")

    def sizes(self, width: int) -> tuple[int, int, int]:
        """(query heads, key heads, head width). Errors: ValueError when they do not divide."""
        if self.head_dim:
            return self.heads, self.kv_heads or self.heads, self.head_dim
        spec.require(
            width % (2 * self.heads) == 0,
            f"heads: width {width} is not a multiple of 2 x heads {self.heads}",
        )
        return self.heads, self.kv_heads or self.heads, width // self.heads


class Full(nn.Module):
    """Causal softmax attention over the whole document.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: grouped-query attention 2305.13245; QK-norm 2302.05442.
    """

    Config = Config

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.config = config
        H, K, Dh = config.sizes(width)
        std = width**-0.5
        self.w_q = nn.param(keys, (width, H, Dh), ("D", "H", "Dh"), std=std)
        self.w_k = nn.param(keys, (width, K, Dh), ("D", "K", "Dh"), std=std)
        self.w_v = nn.param(keys, (width, K, Dh), ("D", "K", "Dv"), std=std)
        self.w_o = nn.param(keys, (H, Dh, width), ("H", "Dv", "D"), std=out_gain * (H * Dh) ** -0.5)
        if config.qk_norm:
            self.q_norm = layers.RMSNorm(Dh, keys, dim="Dh")
            self.k_norm = layers.RMSNorm(Dh, keys, dim="Dh")

    def _project(self, x, positions):
        q = ops.linear(x, nn.read(self.w_q))
        k = ops.linear(x, nn.read(self.w_k))
        v = ops.linear(x, nn.read(self.w_v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = self.config.rope
        return layers.rope(q, positions, rope), layers.rope(k, positions, rope), v

    @property
    def _scale(self) -> float:
        return self.w_q.shape[-1] ** -0.5 * self.config.rope.softmax_gain

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        q, k, v = self._project(x, context.positions)
        o = ops.flash(
            q,
            k,
            v,
            segments_q=context.segments,
            segments_k=context.segments,
            scale=self._scale,
            softcap=self.config.softcap or None,
        )
        return ops.linear(o, nn.read(self.w_o), contract=2)

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` [] against the cache; equal to the parallel forward."""
        B = x_Bx1xD.shape[0]
        positions = jnp.full((B, 1), position, jnp.int32)
        q, k, v = self._project(x_Bx1xD, positions)
        cache = {
            "k": jax.lax.dynamic_update_slice_in_dim(cache["k"], k, position, 1),
            "v": jax.lax.dynamic_update_slice_in_dim(cache["v"], v, position, 1),
        }
        H, K = q.shape[2], cache["k"].shape[2]
        q = q.reshape(B, K, H // K, q.shape[-1]).astype(jnp.float32)
        score = jnp.einsum("bkgd,bskd->bkgs", q, cache["k"].astype(jnp.float32)) * self._scale
        if self.config.softcap:
            score = self.config.softcap * jnp.tanh(score / self.config.softcap)
        p = base.cached_softmax(score, position)
        o = jnp.einsum("bkgs,bskd->bkgd", p, cache["v"].astype(jnp.float32))
        o = o.reshape(B, 1, H, -1).astype(x_Bx1xD.dtype)
        return ops.linear(o, nn.read(self.w_o), contract=2), cache

    @staticmethod
    def mask(config: Config, context: base.Context):
        """Which keys each query sees, [B, L, L]."""
        del config
        return base.causal_mask(context)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`."""
        H, K, Dh = config.sizes(width)
        linear = 2 * width * Dh * (H + 2 * K) + 2 * H * Dh * width
        return base.core_work(linear, H, Dh, Dh, length)

    @staticmethod
    def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds."""
        _, K, Dh = config.sizes(width)
        return {"k": (batch, length, K, Dh), "v": (batch, length, K, Dh)}

    @staticmethod
    def kv_elements(config: Config, width: int) -> int:
        """Cache elements per token."""
        _, K, Dh = config.sizes(width)
        return 2 * K * Dh
