"""Attention to all compressed keys and a window: DeepSeek-V4's HCA."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.attention import base, blocks, indexed, queries
from sparse_pretrain.attention.compressor import Compressor, halves, turn
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(spec.Config):
    """What HCA and CSA share: `ratio` tokens become one entry, the last `window` stay whole.

    Units: window and ratio in tokens.
    """

    heads: int = 4
    q_rank: int = 64
    dim: int = 64
    rope_dim: int = 16
    window: int = 128
    ratio: int = 4
    groups: int = 2
    group_rank: int = 64
    norm_eps: float = 1e-6
    rope: layers.RopeConfig = layers.RopeConfig(theta=160000.0, interleaved=True)

    def __post_init__(self):
        sizes = ("heads", "q_rank", "dim", "window", "ratio", "groups", "group_rank")
        spec.positive(self, *sizes, "norm_eps")
        spec.at_most(self, 2**16, *sizes)
        spec.require(
            self.heads % self.groups == 0,
            f"heads: {self.heads} is not a multiple of groups {self.groups}",
        )
        indexed.rotated(self, "rope_dim", "dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Entries of many tokens, without overlap, all of them seen."""

    KIND: ClassVar[str] = "hca"

    ratio: int = 128


def mean_seen(length: int, limit: int, ratio: int = 1) -> float:
    """Mean over a document's queries of how many keys, of `ratio` tokens each, are before them."""
    return float(np.minimum(np.arange(1, length + 1) // ratio, limit).mean())


class HCA(base.Attention):
    """Shared-key attention to the last tokens and to every compressed entry before.

    Keys are values, of one head; each query head has a sink, and the output is turned back by the
    query's place.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: DeepSeek-V4 (2606.19348), heavily compressed attention.
    Differs: YaRN rescales no scores here, as in the release; compression runs in x's dtype with a
        float32 softmax where the release projects in float32.
    """

    Config: ClassVar[type[Shared]] = Config
    OVERLAP: ClassVar[bool] = False

    def __init__(self, config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.config = c = config
        std = width**-0.5
        self.w_dq = nn.param(keys, (width, c.q_rank), ("D", "Dc"), std=std)
        self.q_norm = layers.RMSNorm(c.q_rank, keys, eps=c.norm_eps, dim="Dc")
        self.w_uq = nn.param(
            keys, (c.q_rank, c.heads, c.dim), ("Dc", "H", "Dh"), std=c.q_rank**-0.5
        )
        self.w_kv = nn.param(keys, (width, c.dim), ("D", "Dc"), std=std)
        self.kv_norm = layers.RMSNorm(c.dim, keys, eps=c.norm_eps, dim="Dc")
        self.compressor = Compressor(
            width, c.dim, keys, ratio=c.ratio, overlap=self.OVERLAP, rope=c.rope,
            rotated=c.rope_dim, eps=c.norm_eps,
        )
        self.sinks = nn.param(keys, (c.heads,), ("H",), value=0.0)
        inner, outer = c.heads // c.groups * c.dim, c.groups * c.group_rank
        self.w_group = nn.param(
            keys, (c.groups, inner, c.group_rank), ("G", "Dv", "Dc"), std=inner**-0.5
        )
        self.w_o = nn.param(keys, (outer, width), ("Dc", "D"), std=out_gain * outer**-0.5)

    @property
    def _scale(self) -> float:
        return self.config.dim**-0.5

    def _halves(self, w, axis: int = -1):
        return halves(w, self.config.rope, self.config.rope_dim, axis)

    def _turn(self, x_BxLxHxD, positions):
        return turn(x_BxLxHxD, positions, self.config.rope, self.config.rope_dim)

    def _latent(self, x):
        return self.q_norm(ops.linear(x, nn.read(self.w_dq, x.dtype)))

    def _queries(self, latent, positions):
        q = ops.linear(latent, self._halves(nn.read(self.w_uq, latent.dtype)))
        ones = jnp.ones(self.config.dim, jnp.float32)
        return self._turn(layers.rms_norm(q, ones, self.config.norm_eps), positions)

    def _keys(self, x, positions):
        scale = self._halves(nn.read(self.kv_norm.scale))
        kv = ops.linear(x, self._halves(nn.read(self.w_kv, x.dtype)))
        kv = layers.rms_norm(kv, scale, self.config.norm_eps)
        return self._turn(kv[:, :, None], positions)

    def _output(self, o_BxLxHxD, positions):
        c = self.config
        o = self._turn(o_BxLxHxD, -positions)  # back: what is read is relative to the query
        w = nn.read(self.w_group, o.dtype)
        w = w.reshape(c.groups, c.heads // c.groups, c.dim, c.group_rank)
        w = self._halves(w, axis=2)
        heads = jnp.split(o, c.groups, axis=2)
        parts = [ops.linear(part, w[g], contract=2) for g, part in enumerate(heads)]
        return ops.linear(jnp.concatenate(parts, axis=-1), nn.read(self.w_o, o.dtype))

    def _visible(self, layout: blocks.Layout, context: base.Context) -> dict:
        """What tells the ops which entries a query may see."""
        return {
            "segments_q": context.segments,
            "segments_k": layout.segments,
            "ends_BxS": layout.ends,
            "stride": self.config.ratio,
            "span": self.config.ratio,
        }

    def _far(self, keys_BxMx1xD, latent, x, layout: blocks.Layout, context: base.Context):
        """How the compressed entries are read, and how they were chosen if they were."""
        del latent, x
        arrays = {"k": keys_BxMx1xD, "v": keys_BxMx1xD}
        options = {"scale": self._scale}
        for name, x in self._visible(layout, context).items():
            (options if isinstance(x, int) else arrays)[name] = x
        return ops.Part("flash", arrays, options), None

    def attend(self, x: Float[Array, "B L D"], context: base.Context):
        """The output [B, L, D] and the indexer's loss of each query [B, L], None without one."""
        c, positions = self.config, context.positions
        latent = self._latent(x)
        q, kv = self._queries(latent, positions), self._keys(x, positions)
        own = {"k": kv, "v": kv, "segments_q": context.segments, "sinks_H": nn.read(self.sinks)}
        near = ops.Part("flash", own, {"scale": self._scale, "window": c.window})
        if x.shape[1] < c.ratio:  # no block is whole
            return self._output(ops.one_softmax(q, near)[0], positions), None
        layout = blocks.layout(context.segments, positions, span=c.ratio, stride=c.ratio)
        keys = self.compressor(x, layout, positions)[:, :, None]
        far, choice = self._far(keys, latent, x, layout, context)
        size = ops.queries_at_once(x.shape[1])
        listed = self._listed(choice)
        if size is not None and (choice is None or listed is not None):
            return self._by_chunks(x, q, [near, far], keys, listed, context, size)
        o, lse = ops.one_softmax(q, near, far)
        loss = None if choice is None else self._loss(choice, q, keys, lse, layout, context)
        return self._output(o, positions), loss

    def _listed(self, choice):
        """(keys of the index, what it chose) where the indexer learns from that, else None."""
        del choice

    def _by_chunks(self, x, q, parts, keys, listed, context: base.Context, size: int):
        """The end of `attend`, its backward pass by chunks. The mass is kept in x's dtype."""
        q = jax.lax.stop_gradient(q)
        o, lse = jax.lax.stop_gradient(ops.one_softmax(q, *parts))
        index_k, chosen = listed or (None, None)
        rows: list[Any] = [context.positions]
        if listed:
            mass = ops.token_mass(q, keys[:, :, 0], chosen, lse, scale=self._scale)
            rows += [chosen, jax.lax.stop_gradient(mass).astype(x.dtype)]

        def call(x, rows, index_k, recall):
            positions, *rows = rows
            latent = self._latent(x)
            o, _ = recall(0, self._queries(latent, positions))
            loss = self._listed_loss(x, latent, index_k, positions, *rows) if rows else None
            return self._output(o, positions), loss

        return queries.by_chunks(call, x, rows, index_k, [(parts, o, lse)], size)

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        return self.attend(x, context)[0]

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` [] against the window's keys and the entries so far."""
        c, B = self.config, x_Bx1xD.shape[0]
        positions = jnp.full((B, 1), position, jnp.int32)
        latent = self._latent(x_Bx1xD)
        q, kv = self._queries(latent, positions), self._keys(x_Bx1xD, positions)
        ring = cache["kv"].shape[1]
        place = jnp.mod(position, ring)
        kept = jax.lax.dynamic_update_slice_in_dim(cache["kv"], kv[:, :, 0], place, 1)
        tail, entries = self.compressor.step(x_Bx1xD, cache["tail"], cache["entries"], position)
        cache = cache | {"kv": kept, "tail": tail, "entries": entries}
        near = jnp.mod(place - jnp.arange(ring), ring) <= position  # how far back each place lies
        far = jnp.arange(entries.shape[1]) < (position + 1) // c.ratio
        near, far = (jnp.broadcast_to(s[None], (B, s.size)) for s in (near, far))
        far, cache = self._narrowed(far, latent, x_Bx1xD, cache, position)

        keys = jnp.concatenate([kept, entries], axis=1).astype(jnp.float32)
        seen = jnp.concatenate([near, far], axis=1)
        score = jnp.einsum("bhd,bsd->bhs", q[:, 0].astype(jnp.float32), keys) * self._scale
        score = jnp.where(seen[:, None], score, -jnp.inf)
        sinks = jnp.broadcast_to(nn.read(self.sinks)[None, :, None], (B, c.heads, 1))
        weight = jax.nn.softmax(jnp.concatenate([score, sinks], axis=2), axis=2)[..., :-1]
        o = jnp.einsum("bhs,bsd->bhd", weight, keys)[:, None].astype(x_Bx1xD.dtype)
        return self._output(o, positions), cache

    def _narrowed(self, far_BxM, latent, x, cache: base.Cache, position):
        """Which of the entries that may be seen are, and the cache with what that needs."""
        del latent, x, position
        return far_BxM, cache

    @classmethod
    def mask(cls, config, context: base.Context):
        """Which tokens may reach each query, [B, L, L]: the window's and those of whole blocks."""
        positions, segments = context.positions, context.segments
        block, whole = positions // config.ratio, (positions + 1) // config.ratio
        past = block[:, None, :] < whole[:, :, None]
        near = base.causal_mask(context, config.window)
        return near | (base.causal_mask(context) & past & (segments != 0)[:, :, None])

    @classmethod
    def linear_work(cls, config, width: int, length: int) -> float:
        """FLOPs of the products with weights per token; trailing tokens are not compressed."""
        c, streams = config, 2 if cls.OVERLAP else 1
        query = width * c.q_rank + c.q_rank * c.heads * c.dim
        pooled = 2 * width * streams * c.dim * (length // c.ratio * c.ratio) / length
        out = c.heads * c.dim * c.group_rank + c.groups * c.group_rank * width
        return 2 * (query + width * c.dim + pooled + out)

    @classmethod
    def work(cls, config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`."""
        m = config.ratio
        near = ops.flash_keys_per_query(length, window=config.window)
        far = ops.flash_keys_per_query(length, keys=length // m, stride=m, span=m)
        seen = mean_seen(length, config.window) + mean_seen(length, length, m)
        each = 2 * config.heads * config.dim
        core = each * (near + far)
        linear = cls.linear_work(config, width, length)
        return base.Work(linear, 2 * core, 5 * core, 2 * each * seen)

    @staticmethod
    def kv_elements(config, width: int) -> int:
        """Cache elements per token, beside the window's fixed number."""
        del width
        return -(-config.dim // config.ratio)

    @classmethod
    def cache_shapes(cls, config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds."""
        del width
        tail, entries = Compressor.cache_shapes(
            config.dim, config.ratio, cls.OVERLAP, batch, length
        )
        kept = (batch, min(config.window, length), config.dim)
        return {"kv": kept, "tail": tail, "entries": entries}
