"""Mixture of block attention: each query head reads its own block and the best few before it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import spec
from sparse_pretrain.attention import base, blocks, grouped
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops

CHUNK = 1024  # queries whose gate scores are held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(grouped.Config):
    """`top_k` blocks of `block` tokens, the query's own block among them.

    The parameters are full attention's, so that training can change from one to the other.
    """

    KIND: ClassVar[str] = "moba"

    block: int = 128
    top_k: int = 3

    def __post_init__(self):
        super().__post_init__()
        spec.positive(self, "block", "top_k")
        spec.at_most(self, 2**20, "block", "top_k")
        spec.require(not self.softcap, f"softcap: moba has none, got {self.softcap}")


class MoBA(grouped.Grouped):
    """Causal attention to the query's block and to the past blocks with the best mean key.

    Blocks count from the document's start, so packing changes nothing.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: MoBA (2502.13189), algorithm 1.
    """

    Config = Config

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        size = ops.queries_at_once(x.shape[1])
        if size is None or self._reads_all(x.shape[1]):
            return super().__call__(x, context)
        return self._by_chunks(x, context, size)

    def _reads_all(self, length: int) -> bool:
        """Whether every earlier block is among the best."""
        return length <= self.config.top_k * self.config.block

    def core(self, q, k, v, context: base.Context) -> jax.Array:
        """One softmax over the own block, causal inside, and the chosen whole blocks."""
        if self._reads_all(q.shape[1]):
            return ops.flash(q, k, v, segments_q=context.segments, scale=self._scale)
        return ops.one_softmax(q, *self.parts(q, k, v, context))[0]

    def parts(self, q, k, v, context: base.Context) -> list[ops.Part]:
        """The own block, causal inside, and the chosen whole ones."""
        c = self.config
        ids = blocks.block_ids(context.segments, context.positions, c.block)
        options = {"scale": self._scale, "window": c.block}
        near = ops.Part("flash", {"k": k, "v": v, "segments_q": ids}, options)
        if c.top_k == 1:
            return [near]
        layout = blocks.layout(context.segments, context.positions, span=c.block, stride=c.block)
        chosen = {
            "k": k, "v": v, "blocks_BxLxGxN": self.choose(q, k, layout, context),
            "starts_BxM": layout.starts,
        }
        options = {"scale": self._scale, "block": c.block}
        return [near, ops.Part("block_sparse", chosen, options)]

    def choose(
        self, q_BxLxHxD, k_BxLxKxD, layout: blocks.Layout, context: base.Context
    ) -> Int[Array, "B L H N"]:
        """The best top_k - 1 blocks that end before the query's own begins; -1 where fewer do."""
        c = self.config
        q, k = jax.lax.stop_gradient((q_BxLxHxD, k_BxLxKxD))
        means = _means(k, layout.starts, c.block)
        begin = jnp.arange(q.shape[1], dtype=jnp.int32)[None] - context.positions % c.block
        N = min(c.top_k - 1, means.shape[1])

        def best(part):
            q, begin, segments = part
            past = layout.ends[:, None] < begin[:, :, None]
            past &= (layout.segments[:, None] == segments[:, :, None]) & (segments != 0)[:, :, None]
            score = jnp.where(past[:, :, None], _gate(q, means), -jnp.inf)
            value, chosen = jax.lax.top_k(score, N)
            return jnp.where(value > -jnp.inf, chosen.astype(jnp.int32), -1)

        return blocks.in_chunks(best, (q, begin, context.segments), CHUNK)

    def seen(
        self, q_BxLxHxD, k_BxLxKxD, context: base.Context
    ) -> Bool[Array, "B H L L"]:
        """Which keys each query head sees, densely: what `core` must be equal to."""
        c = self.config
        L, H = q_BxLxHxD.shape[1:3]
        ids = blocks.block_ids(context.segments, context.positions, c.block)
        same_BxLxL = ids[:, :, None] == ids[:, None, :]
        share = same_BxLxL.astype(layers.wide(k_BxLxKxD.dtype))
        share = share / jnp.sum(share, axis=2, keepdims=True)
        k_BxLxKxD = k_BxLxKxD.astype(share.dtype)
        means = jnp.einsum("bts,bskd->btkd", share, k_BxLxKxD)  # of the block of each key
        score = _gate(q_BxLxHxD, means)
        # a block stands for its first token, where it is a past one of the document
        first = context.positions % c.block == 0
        past = base.causal_mask(context) & ~same_BxLxL
        score = jnp.where((past & first[:, None])[:, :, None], score, -jnp.inf)
        order = jnp.arange(L)
        ahead = score[..., None, :] > score[..., :, None]
        ahead |= (score[..., None, :] == score[..., :, None]) & (
            order[None, :] < order[:, None]
        ).reshape(1, 1, 1, L, L)
        chosen = (jnp.sum(ahead, axis=-1) < c.top_k - 1) & (score > -jnp.inf)
        far = jnp.einsum("blht,bts->bhls", chosen.astype(share.dtype), share) > 0
        own = same_BxLxL & base.causal_mask(context)
        return jnp.broadcast_to(own[:, None], (own.shape[0], H, L, L)) | far

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` []: the blocks' sums choose, then only chosen blocks are read."""
        c = self.config
        q, k, v = self._step(x_Bx1xD, position)
        B, K, G, D = q.shape
        now = position // c.block
        cache = cache | {n: grouped.append(cache[n], t, position) for n, t in (("k", k), ("v", v))}
        # of its keys and not on top of the sum before: rounded to the cache's dtype once
        rows = now * c.block + jnp.arange(c.block)
        own = cache["k"][:, jnp.minimum(rows, cache["k"].shape[1] - 1)].astype(jnp.float32)
        own = jnp.where((rows <= position)[None, :, None, None], own, 0.0)
        sums = jnp.sum(own, axis=1, keepdims=True)
        cache["sums"] = grouped.append(cache["sums"], sums, now)
        M = cache["sums"].shape[1]
        means = cache["sums"].astype(jnp.float32) / c.block
        score = jnp.einsum("bkgd,bmkd->bkgm", q.astype(jnp.float32), means)
        block = jnp.arange(M)[None, None, None]
        score = jnp.where(block < now, score, -jnp.inf)
        score = jnp.where(block == now, jnp.inf, score)
        value, chosen = jax.lax.top_k(score, min(c.top_k, M))
        rows = chosen[..., None] * c.block + jnp.arange(c.block).reshape(1, 1, 1, 1, -1)
        seen = (value > -jnp.inf)[..., None] & (rows <= position)
        rows, seen = (t.reshape(B, K * G, -1) for t in (rows, seen))
        # every query head has keys of its own now
        head = jnp.arange(K * G)[None, :, None] // G
        at = (jnp.arange(B)[:, None, None], jnp.minimum(rows, cache["k"].shape[1] - 1), head)
        k, v = (jnp.moveaxis(cache[name][at], 1, 2) for name in ("k", "v"))
        o = self._read(q.reshape(B, K * G, 1, D), k, v, seen[:, :, None])
        return self._out(o, x_Bx1xD), cache

    @staticmethod
    def mask(config: Config, context: base.Context):
        """Which keys a query may see, [B, L, L]; `seen` has the ones it chose."""
        del config
        return base.causal_mask(context)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`; the gate's scores have no backward pass."""
        c, (H, K, D) = config, config.sizes(width)
        if length <= c.top_k * c.block:
            return base.core_work(MoBA.linear_work(c, width), H, D, D, length)
        near = ops.flash_keys_per_query(length, window=c.block)
        M = length // c.block
        far = ops.block_sparse_keys_per_query(
            length, heads=H, kv_heads=K, groups=H, block=c.block, choices=min(c.top_k - 1, M)
        )
        gate = 2 * H * D * M if c.top_k > 1 else 0
        keys = base.mean_least(length, c.top_k * c.block)
        each = 2 * H * D
        model = 2 * each * keys + gate
        core = 2 * each * (near + far) + gate
        return base.Work(
            MoBA.linear_work(c, width), core, 5 * each * (near + far), min(model, core)
        )

    @staticmethod
    def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds: keys, values and the sum of each block's keys."""
        shapes = grouped.Grouped.cache_shapes(config, width, batch, length)
        _, K, D = config.sizes(width)
        return shapes | {"sums": (batch, -(-length // config.block), K, D)}

    @staticmethod
    def kv_elements(config: Config, width: int) -> int:
        """Cache elements per token, a block's sum shared out among its tokens."""
        _, K, D = config.sizes(width)
        return 2 * K * D + -(-K * D // config.block)


def _gate(q_BxLxHxD, means_BxMxKxD) -> Float[Array, "B L H M"]:
    """q . mean key of each block, as wide as the means."""
    B, L, H, D = q_BxLxHxD.shape
    M, K = means_BxMxKxD.shape[1:3]
    q = q_BxLxHxD.astype(means_BxMxKxD.dtype).reshape(B, L, K, H // K, D)
    return jnp.einsum("blkgd,bmkd->blkgm", q, means_BxMxKxD).reshape(B, L, H, M)


def _means(k_BxLxKxD, starts_BxM, size: int) -> Float[Array, "B M K D"]:
    """Mean key of the blocks that start there, in float32, or float64 of such keys."""
    L = k_BxLxKxD.shape[1]
    rows = starts_BxM[:, :, None] + jnp.arange(size, dtype=jnp.int32)[None, None]
    row = jnp.arange(k_BxLxKxD.shape[0])[:, None, None]
    keys = k_BxLxKxD[row, jnp.minimum(rows, L - 1)]
    return jnp.mean(keys.astype(layers.wide(keys.dtype)), axis=2)
