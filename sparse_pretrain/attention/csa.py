"""Attention to chosen compressed keys and a window: DeepSeek-V4's CSA."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import nn
from sparse_pretrain.attention import base, blocks, hca, indexed
from sparse_pretrain.attention.compressor import Compressor, halves, turn
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hca.Shared, indexed.Indexed):
    """Entries of few tokens, overlapping; an indexer chooses the best `top` for each query."""

    KIND: ClassVar[str] = "csa"

    def __post_init__(self):
        super().__post_init__()
        self.check_indexer()


class Choice(NamedTuple):
    """The indexer's view of a row, and what it chose, None where all is read.

    Shapes: q [B, L, J, Di], k [B, M, Di], w [B, L, J], chosen int [B, L, N].
    """

    q: jax.Array
    k: jax.Array
    w: jax.Array
    chosen: jax.Array | None


class CSA(hca.HCA):
    """Shared-key attention to the last tokens and to the best compressed entries before.

    The indexer sees the layer's input and latent queries but passes no gradient to them: it learns
    from the divergence of its scores from what attention did with the entries, and from that alone.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: DeepSeek-V4 (2606.19348), compressed sparse attention; loss as in V3.2 (2512.02556).
    Differs: the index keys and queries are neither turned by a Hadamard matrix nor quantised.
    """

    Config = Config
    OVERLAP = True
    own = ("index_compressor", "w_iq", "w_iw")

    def __init__(self, config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        super().__init__(config, width, keys, out_gain=out_gain)
        c = config
        self.index_compressor = Compressor(
            width, c.index_dim, keys, ratio=c.ratio, overlap=True, rope=c.rope,
            rotated=c.index_rope_dim, eps=c.norm_eps,
        )
        self.w_iq = nn.param(
            keys, (c.q_rank, c.index_heads, c.index_dim), ("Dc", "J", "Dh"), std=c.q_rank**-0.5
        )
        self.w_iw = nn.param(keys, (width, c.index_heads), ("D", "J"), std=width**-0.5)

    @staticmethod
    def trains_own(config) -> bool:
        """Whether the indexer learns."""
        return config.mode != "dense"

    def _index_queries(self, latent, x, positions):
        """(q [B, L, J, Di], the heads' weights [B, L, J])."""
        c = self.config
        q = ops.linear(latent, halves(nn.read(self.w_iq, latent.dtype), c.rope, c.index_rope_dim))
        weights = ops.linear(x, nn.read(self.w_iw, x.dtype))
        return turn(q, positions, c.rope, c.index_rope_dim), weights

    def _far(self, keys_BxMx1xD, latent, x, layout: blocks.Layout, context: base.Context):
        c, visible = self.config, self._visible(layout, context)
        if c.mode == "dense":
            return super()._far(keys_BxMx1xD, latent, x, layout, context)
        latent, x = jax.lax.stop_gradient((latent, x))
        index_q, w = self._index_queries(latent, x, context.positions)
        index_k = self.index_compressor(x, layout, context.positions)
        choice = Choice(index_q, index_k, w, None)
        if c.mode == "warmup":
            return super()._far(keys_BxMx1xD, latent, x, layout, context)[0], choice
        top = min(c.top, index_k.shape[1])
        chosen = ops.index_select(
            index_q, index_k, w, top=top, scale=self.config.index_scale, **visible
        )
        arrays = {"kv": keys_BxMx1xD[:, :, 0], "chosen_BxLxN": chosen}
        options = {"v_dim": c.dim, "scale": self._scale, "unique": True}
        return ops.Part("token_sparse", arrays, options), choice._replace(chosen=chosen)

    def _listed(self, choice: Choice | None):
        return None if choice is None or choice.chosen is None else (choice.k, choice.chosen)

    def _listed_loss(self, x, latent, index_k, positions, chosen, mass):
        latent, x = jax.lax.stop_gradient((latent, x))
        q, w = self._index_queries(latent, x, positions)
        scale = self.config.index_scale
        return ops.index_kl_listed(q, index_k, w, chosen, mass, scale=scale)

    def _loss(
        self, choice: Choice, q, keys_BxMx1xD, lse, layout: blocks.Layout, context: base.Context
    ) -> Float[Array, "B L"]:
        """Divergence of the indexer from the attention's mass, over the entries that were read."""
        index, scale = (choice.q, choice.k, choice.w), self.config.index_scale
        if choice.chosen is None:
            return ops.index_kl_dense(
                *index, q, keys_BxMx1xD, lse, main_scale=self._scale, scale=scale,
                **self._visible(layout, context),
            )
        keys = keys_BxMx1xD[:, :, 0]
        mass = ops.token_mass(q, keys, choice.chosen, lse, scale=self._scale)
        return ops.index_kl_listed(*index, choice.chosen, mass, scale=scale)

    def _narrowed(self, far_BxM, latent, x, cache: base.Cache, position):
        c = self.config
        tail, entries = self.index_compressor.step(
            x, cache["index_tail"], cache["index_entries"], position
        )
        cache = cache | {"index_tail": tail, "index_entries": entries}
        M = entries.shape[1]
        if c.mode != "sparse" or c.top >= M:
            return far_BxM, cache
        positions = jnp.full((x.shape[0], 1), position, jnp.int32)
        q, w = self._index_queries(latent, x, positions)
        return indexed.best(q[:, 0], w[:, 0], entries, far_BxM, top=c.top), cache

    @classmethod
    def work(cls, config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`; the indexer's loss counts as backward work."""
        c, m = config, config.ratio
        M = length // m
        pooled = 2 * width * 2 * c.index_dim * (M * m) / length
        index = 2 * (c.q_rank * c.index_heads * c.index_dim + width * c.index_heads + pooled)
        linear = cls.linear_work(c, width, length) + (index if c.mode != "dense" else 0)
        each, score = 2 * c.heads * c.dim, 2 * c.index_heads * c.index_dim
        near = ops.flash_keys_per_query(length, window=c.window)
        seen_near = hca.mean_seen(length, c.window)
        everything = ops.flash_keys_per_query(length, keys=M, stride=m, span=m)
        if c.mode != "sparse":
            dense = super().work(c, width, length)
            own = 0.0 if c.mode == "dense" else everything * (each + 3 * score)
            return dense._replace(linear=linear, core_backward=dense.core_backward + own)
        top = min(c.top, M)
        far = {"keys": M, "stride": m, "span": m}
        indexed = score * ops.index_keys_per_query(length, **far)
        indexed += ops.index_choice_per_query(length, top, **far)
        core = 2 * each * (near + top) + indexed
        own = top * (each + 4 * score)  # mass, scores, and their products with both gradients
        model = 2 * each * (seen_near + hca.mean_seen(length, top, m))
        model += score * hca.mean_seen(length, length, m)
        return base.Work(linear, core, 5 * each * (near + top) + own, min(model, core))

    @staticmethod
    def kv_elements(config, width: int) -> int:
        """Cache elements per token, beside the window's fixed number."""
        del width
        return -(-(config.dim + config.index_dim) // config.ratio)

    @classmethod
    def cache_shapes(cls, config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds."""
        shapes = super().cache_shapes(config, width, batch, length)
        tail, entries = Compressor.cache_shapes(
            config.index_dim, config.ratio, True, batch, length
        )
        return shapes | {"index_tail": tail, "index_entries": entries}
