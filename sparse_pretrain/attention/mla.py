"""Multi-head latent attention: keys and values of all heads rebuilt from one small latent."""

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
    """Ranks and head widths; `q_rank=0` projects queries without a latent."""

    KIND: ClassVar[str] = "mla"

    heads: int = 4
    q_rank: int = 0
    kv_rank: int = 64
    nope_dim: int = 32
    rope_dim: int = 16
    v_dim: int = 32
    norm_eps: float = 1e-6
    softcap: float = 0.0
    rope: layers.RopeConfig = layers.RopeConfig(interleaved=True)

    def __post_init__(self):
        sizes = ("heads", "kv_rank", "nope_dim", "rope_dim", "v_dim")
        spec.positive(self, *sizes, "norm_eps")
        spec.at_most(self, 2**16, *sizes, "q_rank")
        spec.require(self.q_rank >= 0, f"q_rank: must not be negative, got {self.q_rank}")
        spec.require(self.rope_dim % 2 == 0, f"rope_dim: must be even, got {self.rope_dim}")
        spec.require(self.softcap >= 0, f"softcap: must not be negative, got {self.softcap}")


class MLA(base.Attention):
    """Latent attention as in DeepSeek-V2 and V3: expanded in training, absorbed in decoding.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: 2405.04434 section 2.1; 2412.19437 equations 1 to 11.
    """

    Config = Config

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.config = c = config
        H, Dq = c.heads, c.nope_dim + c.rope_dim
        std = width**-0.5
        if c.q_rank:
            self.w_dq = nn.param(keys, (width, c.q_rank), ("D", "Dc"), std=std)
            self.q_norm = layers.RMSNorm(c.q_rank, keys, eps=c.norm_eps, dim="Dc")
            self.w_uq = nn.param(keys, (c.q_rank, H, Dq), ("Dc", "H", "Dh"), std=c.q_rank**-0.5)
        else:
            self.w_q = nn.param(keys, (width, H, Dq), ("D", "H", "Dh"), std=std)
        self.w_dkv = nn.param(keys, (width, c.kv_rank + c.rope_dim), ("D", "Dc"), std=std)
        self.kv_norm = layers.RMSNorm(c.kv_rank, keys, eps=c.norm_eps, dim="Dc")
        up = c.kv_rank**-0.5
        self.w_uk = nn.param(keys, (c.kv_rank, H, c.nope_dim), ("Dc", "H", "Dh"), std=up)
        self.w_uv = nn.param(keys, (c.kv_rank, H, c.v_dim), ("Dc", "H", "Dv"), std=up)
        self.w_o = nn.param(
            keys, (H, c.v_dim, width), ("H", "Dv", "D"), std=out_gain * (H * c.v_dim) ** -0.5
        )

    @property
    def _scale(self) -> float:
        c = self.config
        return (c.nope_dim + c.rope_dim) ** -0.5 * c.rope.softmax_gain

    def _halves(self, w, start: int):
        """A projection whose last dim is rotated from `start` on, ready for rotation by halves."""
        if not self.config.rope.interleaved:
            return w
        return jnp.concatenate([w[..., :start], layers.half_split(w[..., start:])], axis=-1)

    def _rope(self, x, positions, start: int = 0):
        halves = dataclasses.replace(self.config.rope, interleaved=False)
        return layers.rope(x, positions, halves, start=start)

    def _latent_queries(self, x):
        """[B, L, Dc]; x itself where queries have no latent."""
        return self.q_norm(ops.linear(x, nn.read(self.w_dq, x.dtype))) if self.config.q_rank else x

    def queries(self, x, positions):
        """[B, L, H, nope + rope], rotated from dim nope on."""
        c = self.config
        x = self._latent_queries(x)
        w = nn.read(self.w_uq if c.q_rank else self.w_q, x.dtype)
        return self._rope(ops.linear(x, self._halves(w, c.nope_dim)), positions, c.nope_dim)

    def latents(self, x, positions):
        """(c_kv [B, L, Dc], k_rope [B, L, rope]): all a cache must hold."""
        c = self.config
        both = ops.linear(x, self._halves(nn.read(self.w_dkv, x.dtype), c.kv_rank))
        k_rope = self._rope(both[..., None, c.kv_rank :], positions)
        return self.kv_norm(both[..., : c.kv_rank]), k_rope[..., 0, :]

    def expanded(self, x, context: base.Context):
        """(q, k, v) of every head, [B, L, H, each its width]."""
        q = self.queries(x, context.positions)
        c_kv, k_rope = self.latents(x, context.positions)
        k_nope = ops.linear(c_kv, nn.read(self.w_uk, c_kv.dtype))
        v = ops.linear(c_kv, nn.read(self.w_uv, c_kv.dtype))
        k_rope = jnp.broadcast_to(k_rope[:, :, None, :], (*k_nope.shape[:3], k_rope.shape[-1]))
        return q, jnp.concatenate([k_nope, k_rope], axis=-1), v

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        q, k, v = self.expanded(x, context)
        o = ops.flash(
            q,
            k,
            v,
            segments_q=context.segments,
            segments_k=context.segments,
            scale=self._scale,
            softcap=self.config.softcap or None,
        )
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2)

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` [] with absorbed projections: heads share the latent as key."""
        return self.decode_chosen(x_Bx1xD, cache, position, None)

    def decode_chosen(
        self, x_Bx1xD, cache: base.Cache, position, chosen_BxS
    ) -> tuple[jax.Array, base.Cache]:
        """As `decode`; of the cached tokens only those chosen are read, all where that is None."""
        B, f32 = x_Bx1xD.shape[0], jnp.float32
        positions = jnp.full((B, 1), position, jnp.int32)
        q = self.queries(x_Bx1xD, positions)
        q_nope, q_rope = jnp.split(q, [self.config.nope_dim], axis=-1)
        c_kv, k_rope = self.latents(x_Bx1xD, positions)
        cache = {
            "c_kv": jax.lax.dynamic_update_slice_in_dim(cache["c_kv"], c_kv, position, 1),
            "k_rope": jax.lax.dynamic_update_slice_in_dim(cache["k_rope"], k_rope, position, 1),
        }
        latent, rotary = cache["c_kv"].astype(f32), cache["k_rope"].astype(f32)
        absorbed = jnp.einsum("bhd,chd->bhc", q_nope[:, 0].astype(f32), nn.read(self.w_uk))
        score = jnp.einsum("bhc,bsc->bhs", absorbed, latent)
        score = score + jnp.einsum("bhr,bsr->bhs", q_rope[:, 0].astype(f32), rotary)
        score = score * self._scale
        if self.config.softcap:
            score = self.config.softcap * jnp.tanh(score / self.config.softcap)
        if chosen_BxS is not None:
            score = jnp.where(chosen_BxS[:, None], score, -jnp.inf)
        p = base.cached_softmax(score, position)
        o = jnp.einsum("bhs,bsc->bhc", p, latent)
        o = jnp.einsum("bhc,chv->bhv", o, nn.read(self.w_uv))[:, None].astype(x_Bx1xD.dtype)
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2), cache

    @staticmethod
    def mask(config: Config, context: base.Context):
        """Which keys each query sees, [B, L, L]."""
        del config
        return base.causal_mask(context)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`, expanded form."""
        c, Dq = config, config.nope_dim + config.rope_dim
        query = width * c.q_rank + c.q_rank * c.heads * Dq if c.q_rank else width * c.heads * Dq
        keys = width * (c.kv_rank + c.rope_dim) + c.kv_rank * c.heads * (c.nope_dim + c.v_dim)
        linear = 2 * (query + keys + c.heads * c.v_dim * width)
        return base.core_work(linear, c.heads, Dq, c.v_dim, length)

    @staticmethod
    def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds."""
        del width
        return {
            "c_kv": (batch, length, config.kv_rank),
            "k_rope": (batch, length, config.rope_dim),
        }

    @staticmethod
    def kv_elements(config: Config, width: int) -> int:
        """Cache elements per token."""
        del width
        return config.kv_rank + config.rope_dim
