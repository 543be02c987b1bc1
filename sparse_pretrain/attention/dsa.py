"""DeepSeek sparse attention: an indexer chooses the tokens that latent attention reads."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.attention import base, blocks, indexed, mla, queries
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mla.Config, indexed.Indexed):
    """Latent attention to the `top` tokens that the indexer scores highest."""

    KIND: ClassVar[str] = "dsa"
    MOST: ClassVar[int] = 2**20

    top: int = 256

    def __post_init__(self):
        super().__post_init__()
        self.check_indexer()
        spec.require(not self.softcap, f"softcap: dsa has none, got {self.softcap}")


class Index(NamedTuple):
    """What the indexer makes of a row. Shapes: q [B, L, J, Di], k [B, L, Di], w [B, L, J]."""

    q: jax.Array
    k: jax.Array
    w: jax.Array


class Indexer(nn.Module):
    """Scores of earlier tokens: a few small heads, one key, rectified and weighed.

    Shapes: x [B, L, D] and latent queries [B, L, Dc] -> Index.
    Source: DeepSeek-V3.2 (2512.02556); rotation on the first dims, by halves, as in its code.
    Differs: queries and keys are neither turned by a Hadamard matrix nor quantised.
    """

    def __init__(self, config: Config, width: int, keys: nn.Keys):
        self.config = c = config
        inner = c.q_rank or width
        self.w_q = nn.param(
            keys, (inner, c.index_heads, c.index_dim), ("Dc", "J", "Dh"), std=inner**-0.5
        )
        self.w_k = nn.param(keys, (width, c.index_dim), ("D", "Dh"), std=width**-0.5)
        self.k_scale = nn.param(keys, (c.index_dim,), ("Dh",), value=1.0)
        self.k_bias = nn.param(keys, (c.index_dim,), ("Dh",), value=0.0)
        self.w_w = nn.param(keys, (width, c.index_heads), ("D", "J"), std=width**-0.5)

    def _turn(self, x_BxLxHxD, positions):
        c = self.config
        if not c.index_rope_dim:
            return x_BxLxHxD
        turned, rest = jnp.split(x_BxLxHxD, [c.index_rope_dim], axis=-1)
        halves = dataclasses.replace(c.rope, interleaved=False)
        return jnp.concatenate([layers.rope(turned, positions, halves), rest], axis=-1)

    def __call__(self, x, latent, positions) -> Index:
        q, w = self.of_queries(x, latent, positions)
        return Index(q, self.of_keys(x, positions), w)

    def of_queries(self, x, latent, positions):
        """(q, w) of an Index."""
        q = self._turn(ops.linear(latent, nn.read(self.w_q, latent.dtype)), positions)
        return q, ops.linear(x, nn.read(self.w_w, x.dtype))

    def of_keys(self, x, positions):
        """The k of an Index."""
        k = ops.linear(x, nn.read(self.w_k, x.dtype))
        k = _layer_norm(k, nn.read(self.k_scale), nn.read(self.k_bias), self.config.norm_eps)
        return self._turn(k[:, :, None], positions)[:, :, 0]


class DSA(mla.MLA):
    """Latent attention, absorbed: every head reads the chosen tokens' latents.

    The indexer sees the layer's input and latent queries but passes no gradient to them: it learns
    from the divergence of its scores from what attention did, and from that alone.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: DeepSeek-V3.2 (2512.02556).
    """

    Config = Config
    own = ("indexer",)

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        super().__init__(config, width, keys, out_gain=out_gain)
        self.indexer = Indexer(config, width, keys)

    @staticmethod
    def trains_own(config: Config) -> bool:
        """Whether the indexer learns."""
        return config.mode != "dense"

    def index(self, x, positions) -> Index:
        """What the indexer makes of what the layer reads; no gradient passes to either."""
        x = jax.lax.stop_gradient(x)
        return self.indexer(x, jax.lax.stop_gradient(self._latent_queries(x)), positions)

    def choose(self, index: Index, context: base.Context):
        """The best tokens of each query, int32 [B, L, N], -1 where fewer are before it."""
        return ops.index_select(
            *index, top=min(self.config.top, index.k.shape[1]), segments_q=context.segments,
            segments_k=context.segments, scale=self.config.index_scale,
        )

    def attend(self, x: Float[Array, "B L D"], context: base.Context):
        """The output [B, L, D] and the indexer's loss of each query [B, L], None without one."""
        if self.config.mode == "dense":
            return super().__call__(x, context), None
        index = self.index(x, context.positions)
        if self.config.mode == "warmup":
            return self._warmup(x, index, context)
        latent, k_rope = self.latents(x, context.positions)
        keys = jnp.concatenate([latent, k_rope], axis=-1)
        chosen = self.choose(index, context)
        size = ops.queries_at_once(x.shape[1])
        if size is not None:
            return self._by_chunks(x, index.k, keys, chosen, context, size)
        q = self._absorbed(x, context.positions)
        o, lse = ops.token_sparse(
            q, keys, chosen, v_dim=latent.shape[-1], scale=self._scale, unique=True,
            return_lse=True,
        )
        mass = ops.token_mass(q, keys, chosen, lse, scale=self._scale)
        loss = ops.index_kl_listed(*index, chosen, mass, scale=self.config.index_scale)
        return self._projected(o), loss

    def _absorbed(self, x, positions):
        """Queries of the latents, [B, L, H, Dc + rope]."""
        q = self.queries(x, positions)
        q_nope, q_rope = jnp.split(q, [self.config.nope_dim], axis=-1)
        absorbed = _per_head(q_nope, jnp.transpose(nn.read(self.w_uk, q_nope.dtype), (1, 2, 0)))
        return jnp.concatenate([absorbed, q_rope], axis=-1)

    def _projected(self, o_BxLxHxDc):
        o = _per_head(o_BxLxHxDc, jnp.transpose(nn.read(self.w_uv, o_BxLxHxDc.dtype), (1, 0, 2)))
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2)

    def _by_chunks(self, x, index_k, keys, chosen, context: base.Context, size: int):
        """The end of `attend`, by chunks of queries. The mass is kept in x's dtype."""
        c, v_dim = self.config, self.config.kv_rank
        options = {"v_dim": v_dim, "scale": self._scale, "unique": True}

        def read(part):
            x, positions, chosen = part
            q = self._absorbed(x, positions)
            o, lse = ops.token_sparse(q, keys, chosen, **options, return_lse=True)
            mass = ops.token_mass(q, keys, chosen, lse, scale=self._scale)
            return o, lse, mass.astype(x.dtype)

        found = blocks.in_chunks(read, (x, context.positions, chosen), size)
        o, lse, mass = jax.lax.stop_gradient(found)
        part = ops.Part("token_sparse", {"kv": keys, "chosen_BxLxN": chosen}, options)

        def call(x, rows, index_k, recall):
            positions, chosen, mass = rows
            o, _ = recall(0, self._absorbed(x, positions))
            x = jax.lax.stop_gradient(x)
            latent = jax.lax.stop_gradient(self._latent_queries(x))
            q, w = self.indexer.of_queries(x, latent, positions)
            loss = ops.index_kl_listed(q, index_k, w, chosen, mass, scale=c.index_scale)
            return self._projected(o), loss

        rows = context.positions, chosen, mass
        return queries.by_chunks(call, x, rows, index_k, [([part], o, lse)], size)

    def _warmup(self, x, index: Index, context: base.Context):
        q, k, v = self.expanded(x, context)
        segments = {"segments_q": context.segments, "segments_k": context.segments}
        o, lse = ops.flash(q, k, v, **segments, scale=self._scale, return_lse=True)
        loss = ops.index_kl_dense(
            *index, q, k, lse, main_scale=self._scale, scale=self.config.index_scale, **segments
        )
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2), loss

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        return self.attend(x, context)[0]

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` [] against the latents of the tokens that it chooses."""
        positions = jnp.full((x_Bx1xD.shape[0], 1), position, jnp.int32)
        index = self.index(x_Bx1xD, positions)
        keys = jax.lax.dynamic_update_slice_in_dim(cache["k_index"], index.k, position, 1)
        chosen = self._chosen(index, keys, position)
        o, rest = self.decode_chosen(x_Bx1xD, cache, position, chosen)
        return o, rest | {"k_index": keys}

    def _chosen(self, index: Index, keys_BxSxD, position):
        """Which cached tokens the query reads, [B, S]; None for all."""
        S = keys_BxSxD.shape[1]
        if self.config.mode != "sparse" or self.config.top >= S:
            return None
        seen = jnp.broadcast_to((jnp.arange(S) <= position)[None], keys_BxSxD.shape[:2])
        return indexed.best(index.q[:, 0], index.w[:, 0], keys_BxSxD, seen, top=self.config.top)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`; the indexer's loss counts as backward work."""
        c, dense = config, mla.MLA.work(config, width, length)
        if c.mode == "dense":
            return dense
        inner = c.q_rank or width
        index = inner * c.index_heads * c.index_dim + width * (c.index_dim + c.index_heads)
        linear, score = dense.linear + 2 * index, 2 * c.index_heads * c.index_dim
        scored = ops.index_keys_per_query(length)
        if c.mode == "warmup":
            each = 2 * c.heads * (c.nope_dim + c.rope_dim)
            own = scored * (each + 4 * score)
            return dense._replace(linear=linear, core_backward=dense.core_backward + own)
        top = min(c.top, length)
        qk, v = c.kv_rank + c.rope_dim, c.kv_rank
        own = top * (2 * c.heads * qk + 4 * score)  # the target, scores, and their gradients
        each = 2 * c.heads * top
        # XLA weighs all dims of a token, whose first ones are its value
        core = each * 2 * qk + score * scored + ops.index_choice_per_query(length, top)
        model = 2 * c.heads * (qk + v) * base.mean_least(length, top) + score * (length + 1) / 2
        return base.Work(linear, core, each * 5 * qk + own, min(model, core))

    @staticmethod
    def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds: latents, and the indexer's keys."""
        shapes = mla.MLA.cache_shapes(config, width, batch, length)
        return shapes | {"k_index": (batch, length, config.index_dim)}

    @staticmethod
    def kv_elements(config: Config, width: int) -> int:
        """Cache elements per token."""
        return mla.MLA.kv_elements(config, width) + config.index_dim


def _layer_norm(x, scale_D, bias_D, eps: float):
    """LayerNorm over the last dim, in float32 or wider."""
    dtype = layers.wide(x.dtype)
    wide = x.astype(dtype)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scale, bias = (t.astype(dtype).reshape(1, 1, -1) for t in (scale_D, bias_D))
    return (wide * scale + bias).astype(x.dtype)


def _per_head(x_BxLxHxD, w_HxDxC):
    """Every head times a matrix of its own, [B, L, H, C]."""
    return jax.vmap(ops.linear, in_axes=(2, 0), out_axes=2)(x_BxLxHxD, w_HxDxC)
