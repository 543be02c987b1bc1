"""Grouped-query projections, QK-norm and rotary positions: what several variants share."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.attention import base, queries
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`kv_heads=0` means one key head per query head, `head_dim=0` width over heads.

    `qk_norm` is per head, or with `qk_norm_joint` over all heads of a token, as in OLMoE.
    """

    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = True
    qk_norm_joint: bool = False
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


class Grouped(base.Attention):
    """Parameters and projections of grouped-query attention, and decoding under a causal mask.

    Two variants with this parent have the same parameters, so that a model can change between them.

    Source: grouped-query attention 2305.13245; QK-norm 2302.05442.
    """

    def __init__(self, config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.config = config
        H, K, Dh = config.sizes(width)
        std = width**-0.5
        self.w_q = nn.param(keys, (width, H, Dh), ("D", "H", "Dh"), std=std)
        self.w_k = nn.param(keys, (width, K, Dh), ("D", "K", "Dh"), std=std)
        self.w_v = nn.param(keys, (width, K, Dh), ("D", "K", "Dv"), std=std)
        self.w_o = nn.param(keys, (H, Dh, width), ("H", "Dv", "D"), std=out_gain * (H * Dh) ** -0.5)
        if config.qk_norm:
            joint = config.qk_norm_joint
            self.q_norm = layers.RMSNorm(Dh * H if joint else Dh, keys, dim="Dh")
            self.k_norm = layers.RMSNorm(Dh * K if joint else Dh, keys, dim="Dh")

    def _project(self, x, positions):
        return self._queries(x, positions), *self._keys(x, positions)

    def _queries(self, x, positions):
        q = ops.linear(x, nn.read(self.w_q, x.dtype))
        q = self._normed(self.q_norm, q) if self.config.qk_norm else q
        return layers.rope(q, positions, self.config.rope)

    def _keys(self, x, positions):
        raw = [ops.linear(x, nn.read(w, x.dtype)) for w in (self.w_k, self.w_v)]
        return self._turned(raw, positions)

    def _turned(self, raw, positions):
        k, v = raw
        k = self._normed(self.k_norm, k) if self.config.qk_norm else k
        return layers.rope(k, positions, self.config.rope), v

    def _normed(self, norm, x_BxLxHxD):
        if not self.config.qk_norm_joint:
            return norm(x_BxLxHxD)
        return norm(x_BxLxHxD.reshape(*x_BxLxHxD.shape[:2], -1)).reshape(x_BxLxHxD.shape)

    @property
    def _scale(self) -> float:
        return self.w_q.shape[-1] ** -0.5 * self.config.rope.softmax_gain

    def core(self, q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, context: base.Context) -> jax.Array:
        """What each query reads, [B, L, H, D]: all that sets these variants apart."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        q, k, v = self._project(x, context.positions)
        return ops.linear(self.core(q, k, v, context), nn.read(self.w_o, x.dtype), contract=2)

    def _by_chunks(self, x, context: base.Context, size: int) -> jax.Array:
        """`__call__` of one softmax over `parts`, its backward pass by chunks of queries."""
        # one product, whose gradient is one
        w = jnp.concatenate([nn.read(w, x.dtype) for w in (self.w_k, self.w_v)], axis=1)
        k, v = self._turned(jnp.split(ops.linear(x, w), 2, axis=2), context.positions)
        q = jax.lax.stop_gradient(self._queries(x, context.positions))
        parts = self.parts(q, k, v, context)
        o, lse = jax.lax.stop_gradient(ops.one_softmax(q, *parts))

        def call(x, positions, shared, recall):
            del shared
            o, _ = recall(0, self._queries(x, positions))
            return ops.linear(o, nn.read(self.w_o, x.dtype), contract=2)

        return queries.by_chunks(call, x, context.positions, (), [(parts, o, lse)], size)

    def parts(self, q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, context: base.Context) -> list[ops.Part]:
        """The keys that `core` reads, of one softmax."""
        raise NotImplementedError

    def _read(self, q_BxKxGxD, k_BxSxKxD, v_BxSxKxD, seen, sinks_KxG=None) -> jax.Array:
        """[B, K, G, D] float32: one query against cached keys where `seen` [B|1, K|1, G|1, S]."""
        q, k, v = (t.astype(jnp.float32) for t in (q_BxKxGxD, k_BxSxKxD, v_BxSxKxD))
        score = jnp.einsum("bkgd,bskd->bkgs", q, k) * self._scale
        if self.config.softcap:
            score = self.config.softcap * jnp.tanh(score / self.config.softcap)
        score = jnp.where(jnp.broadcast_to(seen, score.shape), score, -jnp.inf)
        if sinks_KxG is not None:
            sink = jnp.broadcast_to(sinks_KxG[None, :, :, None], (*score.shape[:3], 1))
            score = jnp.concatenate([score, sink], axis=-1)
        p = jax.nn.softmax(score, axis=-1)[..., : k.shape[1]]
        return jnp.einsum("bkgs,bskd->bkgd", p, v)

    def _step(self, x_Bx1xD, position):
        """(q [B, K, G, D], k and v [B, 1, K, D]) of one token."""
        positions = jnp.full((x_Bx1xD.shape[0], 1), position, jnp.int32)
        q, k, v = self._project(x_Bx1xD, positions)
        K = k.shape[2]
        return q[:, 0].reshape(q.shape[0], K, -1, q.shape[3]), k, v

    def _out(self, o_BxKxGxD, x_Bx1xD):
        B, K, G, D = o_BxKxGxD.shape
        o = o_BxKxGxD.reshape(B, 1, K * G, D).astype(x_Bx1xD.dtype)
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2)

    @staticmethod
    def linear_work(config, width: int) -> float:
        """FLOPs of the projections per token."""
        H, K, Dh = config.sizes(width)
        return 2 * width * Dh * (H + 2 * K) + 2 * H * Dh * width

    @staticmethod
    def cache_shapes(config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds."""
        _, K, Dh = config.sizes(width)
        return {"k": (batch, length, K, Dh), "v": (batch, length, K, Dh)}

    @staticmethod
    def kv_elements(config, width: int) -> int:
        """Cache elements per token."""
        _, K, Dh = config.sizes(width)
        return 2 * K * Dh


def append(cache_BxSx, new_Bx1x, at) -> jax.Array:
    """The cache with one token's values at row `at`."""
    return jax.lax.dynamic_update_slice_in_dim(cache_BxSx, new_Bx1x.astype(cache_BxSx.dtype), at, 1)
