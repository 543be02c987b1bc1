"""Native sparse attention: compressed entries, chosen blocks and a window, gated per head."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.attention import base, blocks, grouped, queries, selection
from sparse_pretrain.attention.phi import Compressor
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops

BRANCHES = ("compress", "select", "window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(grouped.Config):
    """Entries of `span` tokens every `stride`; `top_k` blocks of `block` tokens; a `window`.

    Of the `top_k` blocks one is the document's first and `local` are the last, the query's own
    among them. `hidden` is the width of the compressing MLP, 0 for twice the head's.

    Units: span, stride, block and window in tokens.
    """

    KIND: ClassVar[str] = "nsa"

    span: int = 32
    stride: int = 16
    hidden: int = 0
    block: int = 64
    top_k: int = 16
    local: int = 2
    window: int = 512

    def __post_init__(self):
        super().__post_init__()
        sizes = ("span", "stride", "block", "top_k", "local", "window")
        spec.positive(self, *sizes)
        spec.at_most(self, 2**20, *sizes, "hidden")
        spec.require(self.hidden >= 0, f"hidden: must not be negative, got {self.hidden}")
        for name in ("span", "block"):
            size = getattr(self, name)
            spec.require(
                size % self.stride == 0, f"{name}: {size} is not a multiple of stride {self.stride}"
            )
        spec.require(
            self.top_k > self.local,
            f"top_k: {self.top_k} must be above local {self.local}, for the first block is read",
        )
        spec.require(not self.softcap, f"softcap: nsa has none, got {self.softcap}")
        spec.require(not self.qk_norm_joint, "qk_norm_joint: nsa has none, got True")

    @property
    def selected(self) -> selection.Sizes:
        """What tells the selection how entries and blocks lie."""
        return selection.Sizes(self.span, self.stride, self.block, self.top_k, self.local)


class NSA(grouped.Grouped):
    """Three ways to attend, each with keys and values of its own, weighed by a gate per head.

    Every query head weighs the branches by sigmoids of a linear map of the token. Heads of one
    key head read the same blocks. The query is the same in all branches. Keys are normed and
    turned as full attention's; those of entries after compression, by the place of their first
    token. `select` has full attention's parameters.

    Shapes: x [B, L, D] -> [B, L, D].
    Source: NSA (2502.11089), equations 5 to 12.
    Differs: the paper says neither how keys are turned nor what the gate's and phi's MLPs are:
        here gates are linear and phi has one hidden layer with silu. Blocks count from the
        document's start.
    """

    Config = Config
    # what each branch attends by, and the mask it must be equal to
    CORES: ClassVar[dict[str, str]] = {name: f"seen_{name}" for name in BRANCHES}

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        super().__init__(config, width, keys, out_gain=out_gain)
        c, (H, K, Dh) = config, config.sizes(width)
        std, key, value = width**-0.5, ("D", "K", "Dh"), ("D", "K", "Dv")
        self.w_k_window = nn.param(keys, (width, K, Dh), key, std=std)
        self.w_v_window = nn.param(keys, (width, K, Dh), value, std=std)
        self.w_k_compress = nn.param(keys, (width, K, Dh), key, std=std)
        self.w_v_compress = nn.param(keys, (width, K, Dh), value, std=std)
        hidden = c.hidden or 2 * Dh
        self.phi_k = Compressor(c.span, c.stride, Dh, hidden, keys)
        self.phi_v = Compressor(c.span, c.stride, Dh, hidden, keys)
        self.w_gate = nn.param(keys, (width, len(BRANCHES) * H), ("D", "Dc"), std=std)
        if c.qk_norm:
            self.k_norm_window = layers.RMSNorm(Dh, keys, dim="Dh")
            self.k_norm_compress = layers.RMSNorm(Dh, keys, dim="Dh")

    def _raw(self, x, of: str):
        """The products with the weights of keys and values of a branch."""
        weights = getattr(self, f"w_k_{of}"), getattr(self, f"w_v_{of}")
        return tuple(ops.linear(x, nn.read(w, x.dtype)) for w in weights)

    def _raw_at_once(self, x):
        """(keys, values) of select, window and compress, of one product, whose gradient is one."""
        of = (self.w_k, self.w_v, self.w_k_window, self.w_v_window)
        of += (self.w_k_compress, self.w_v_compress)
        w = jnp.concatenate([nn.read(w, x.dtype) for w in of], axis=1)
        raw = jnp.split(ops.linear(x, w), len(of), axis=2)
        return [(raw[i], raw[i + 1]) for i in range(0, len(of), 2)]

    def _window_keys(self, raw, positions):
        k, v = raw
        if self.config.qk_norm:
            k = self.k_norm_window(k)
        return layers.rope(k, positions, self.config.rope), v

    def _entry_keys(self, k_BxMxKxD, positions_BxM):
        if self.config.qk_norm:
            k_BxMxKxD = self.k_norm_compress(k_BxMxKxD)
        return layers.rope(k_BxMxKxD, positions_BxM, self.config.rope)

    def _gated(self, x, outputs) -> jax.Array:
        """The branches' outputs [B, L, H, D] by the gates."""
        gates = ops.linear(x, nn.read(self.w_gate, x.dtype))
        gates = jax.nn.sigmoid(gates.astype(layers.wide(x.dtype)))
        gates = gates.reshape(*x.shape[:2], len(BRANCHES), -1, 1)
        o = sum(o.astype(gates.dtype) * gates[:, :, i] for i, o in enumerate(outputs))
        return o.astype(x.dtype)

    def _entries(self, raw, positions, chunks: blocks.Layout):
        k, v = (phi(t, chunks) for phi, t in zip((self.phi_k, self.phi_v), raw, strict=True))
        return self._entry_keys(k, jnp.take_along_axis(positions, chunks.starts, axis=1)), v

    def __call__(self, x: Float[Array, "B L D"], context: base.Context) -> Float[Array, "B L D"]:
        c, positions = self.config, context.positions
        chunks = blocks.layout(context.segments, positions, span=c.stride, stride=c.stride)
        size = ops.queries_at_once(x.shape[1])
        if size is not None and chunks.starts.shape[1]:
            return self._by_branches(x, context, chunks, size)
        q, k, v = self._project(x, positions)
        k_window, v_window = self._window_keys(self._raw(x, "window"), positions)
        k_entry, v_entry = self._entries(self._raw(x, "compress"), positions, chunks)
        window = self.window(q, k_window, v_window, context)
        compress, lse = self.compress(q, k_entry, v_entry, context, chunks, return_lse=True)
        select = self.select(q, k, v, context, chunks, k_entry, lse)
        o = self._gated(x, (compress, select, window))
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2)

    def _by_branches(self, x, context: base.Context, chunks: blocks.Layout, size: int):
        """As `__call__`, its backward pass by chunks of queries."""
        c, positions = self.config, context.positions
        own, last, whole = self._raw_at_once(x)
        k_entry, v_entry = self._entries(whole, positions, chunks)
        q = jax.lax.stop_gradient(self._queries(x, positions))
        entries = selection.entries_of(chunks, c.selected, x.shape[1])
        far = {"k": k_entry, "v": v_entry, "segments_q": context.segments}
        far |= {"segments_k": entries.segments, "ends_BxS": entries.ends}
        options = {"stride": c.stride, "span": c.span, "scale": self._scale}
        compress = [ops.Part("flash", far, options)]
        k, v = self._window_keys(last, positions)
        near = {"k": k, "v": v, "segments_q": context.segments}
        window = [ops.Part("flash", near, {"scale": self._scale, "window": c.window})]
        found = [(compress, *jax.lax.stop_gradient(ops.one_softmax(q, *compress)))]
        k, v = self._turned(own, positions)
        select = self._selected(q, k, v, context, chunks, k_entry, found[0][2])
        for parts in (select, window):
            found.append((parts, *jax.lax.stop_gradient(ops.one_softmax(q, *parts))))

        def call(x, positions, shared, recall):
            del shared
            q = self._queries(x, positions)
            o = self._gated(x, [recall(i, q)[0] for i in range(len(BRANCHES))])
            return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2)

        return queries.by_chunks(call, x, positions, (), found, size)

    def window(self, q, k, v, context: base.Context) -> jax.Array:
        """The last tokens."""
        return ops.flash(
            q, k, v, segments_q=context.segments, scale=self._scale, window=self.config.window
        )

    def seen_window(self, q, k, context: base.Context) -> Bool[Array, "B L L"]:
        """Which tokens `window` sees."""
        del q, k
        return base.causal_mask(context, self.config.window)

    def compress(
        self, q, k, v, context: base.Context, chunks: blocks.Layout, *, return_lse: bool
    ):
        """The entries that have ended; 0 before the first has."""
        c, (B, L, H) = self.config, q.shape[:3]
        if not k.shape[1]:
            o, lse = jnp.zeros_like(q), jnp.full((B, L, H), -1e30, layers.wide(q.dtype))
            return (o, lse) if return_lse else o
        entries = selection.entries_of(chunks, c.selected, L)
        return ops.flash(
            q, k, v, segments_q=context.segments, segments_k=entries.segments,
            ends_BxS=entries.ends, stride=c.stride, span=c.span, scale=self._scale,
            return_lse=return_lse,
        )

    def seen_compress(
        self, q, k, context: base.Context, chunks: blocks.Layout
    ) -> Bool[Array, "B L M"]:
        """Which entries `compress` sees."""
        del k
        entries = selection.entries_of(chunks, self.config.selected, q.shape[1])
        same = context.segments[:, :, None] == entries.segments[:, None, :]
        row = jnp.arange(q.shape[1], dtype=jnp.int32)
        ended = entries.ends[:, None, :] <= row[None, :, None]
        return same & ended & (context.segments != 0)[:, :, None]

    def select(
        self, q, k, v, context: base.Context, chunks: blocks.Layout, k_entry, lse
    ) -> jax.Array:
        """One softmax over the query's own block, causal inside, and the chosen whole ones."""
        return ops.one_softmax(q, *self._selected(q, k, v, context, chunks, k_entry, lse))[0]

    def _selected(
        self, q, k, v, context: base.Context, chunks: blocks.Layout, k_entry, lse
    ) -> list[ops.Part]:
        c = self.config
        ids = blocks.block_ids(context.segments, context.positions, c.block)
        own = {"k": k, "v": v, "ids_q": ids, "ids_k": ids}
        near = ops.Part("own_block", own, {"size": c.block, "scale": self._scale})
        if q.shape[1] <= c.block:
            return [near]
        past = selection.past_of(context, c.block)
        chosen = selection.choose(q, k_entry, lse, chunks, past, c.selected, self._scale)
        far = {"k": k, "v": v, "blocks_BxLxGxN": chosen, "starts_BxM": past.layout.starts}
        options = {"block": c.block, "scale": self._scale}
        return [near, ops.Part("block_sparse", far, options)]

    def seen_select(
        self, q, k, context: base.Context, chunks: blocks.Layout, k_entry, lse
    ) -> Bool[Array, "B H L L"]:
        """Which tokens `select` sees, densely: every token has the score of its block."""
        del k, lse
        c, (B, L, H, _), K = self.config, q.shape, k_entry.shape[2]
        seen = self.seen_compress(q, k_entry, context, chunks)
        score = jnp.einsum(
            "blkgd,bmkd->bkglm", q.reshape(B, L, K, H // K, -1), k_entry,
            preferred_element_type=layers.wide(q.dtype),
        )
        score = jnp.where(seen[:, None, None], score * self._scale, -jnp.inf)
        p = jnp.where(seen[:, None, None], jax.nn.softmax(score, axis=-1), 0)
        p = jnp.sum(p, axis=2)
        row = jnp.arange(L, dtype=jnp.int32)
        starts = chunks.starts[:, :, None]
        inside = (row[None, None] >= starts) & (row[None, None] < starts + c.span)
        mass = jnp.einsum("bklm,bms->bkls", p, inside.astype(p.dtype))  # of each token
        ids = blocks.block_ids(context.segments, context.positions, c.block)
        same = ids[:, :, None] == ids[:, None, :]
        block = jnp.einsum("bkls,bst->bklt", mass, same.astype(p.dtype)) / c.stride
        # a block stands for its first token
        number = context.positions // c.block
        behind = (number[:, :, None] - number[:, None, :])[:, None]
        first = (context.positions % c.block == 0)[:, None, None]
        causal = base.causal_mask(context)[:, None]
        forced = (behind < c.local) | (number == 0)[:, None, None]
        block = jnp.where(forced, jnp.inf, block)
        block = jnp.where(causal & first, block, -jnp.inf)
        ahead = block[..., None, :] > block[..., :, None]
        ahead |= (block[..., None, :] == block[..., :, None]) & (
            row[None, :] < row[:, None]
        ).reshape(1, 1, 1, L, L)
        chosen = (jnp.sum(ahead, axis=-1) < c.top_k) & (block > -jnp.inf)
        read = jnp.einsum("bklt,bts->bkls", chosen.astype(jnp.float32), same.astype(jnp.float32))
        return jnp.repeat((read > 0) & causal, H // K, axis=1)

    def decode(self, x_Bx1xD, cache: base.Cache, position) -> tuple[jax.Array, base.Cache]:
        """One token at `position` []: an entry once it is whole, then only chosen blocks."""
        c, B = self.config, x_Bx1xD.shape[0]
        positions = jnp.full((B, 1), position, jnp.int32)
        q, k, v = self._step(x_Bx1xD, position)
        cache = cache | {n: grouped.append(cache[n], t, position) for n, t in (("k", k), ("v", v))}
        # the window's keys lie in a ring
        ring = cache["k_window"].shape[1]
        place = jnp.mod(position, ring)
        k, v = self._window_keys(self._raw(x_Bx1xD, "window"), positions)
        for name, new in (("k_window", k), ("v_window", v)):
            cache[name] = grouped.append(cache[name], new, place)
        near = jnp.mod(place - jnp.arange(ring), ring) <= position
        window = self._read(q, cache["k_window"], cache["v_window"], near[None, None, None])
        cache = self._compressed(x_Bx1xD, cache, position)
        compress, score = self._entries_read(q, cache, position)
        select = self._blocks_read(q, cache, score, position)
        outputs = [o.reshape(B, 1, c.heads, -1) for o in (compress, select, window)]
        o = self._gated(x_Bx1xD, outputs)
        return ops.linear(o, nn.read(self.w_o, o.dtype), contract=2), cache

    def _compressed(self, x_Bx1xD, cache: base.Cache, position) -> base.Cache:
        """The cache with the token among the last `span`, and the entry that it ends if it does."""
        c = self.config
        index = (position - (c.span - 1)) // c.stride
        whole = (position >= c.span - 1) & (jnp.mod(position - (c.span - 1), c.stride) == 0)
        cache = dict(cache)
        parts = (("k", self.w_k_compress, self.phi_k), ("v", self.w_v_compress, self.phi_v))
        for name, w, phi in parts:
            tail, kept = cache[f"{name}_tail"], cache[f"{name}_entry"]
            new = ops.linear(x_Bx1xD, nn.read(w, x_Bx1xD.dtype))
            cache[f"{name}_tail"] = tail = jnp.concatenate(
                [tail[:, 1:], new.astype(tail.dtype)], axis=1
            )
            if not kept.shape[1]:
                continue
            entry = phi.one(tail.astype(x_Bx1xD.dtype))[:, None]
            if name == "k":
                place = jnp.full(entry.shape[:2], position - (c.span - 1), jnp.int32)
                entry = self._entry_keys(entry, place)
            at = jnp.clip(index, 0, kept.shape[1] - 1)
            old = jax.lax.dynamic_slice_in_dim(kept, at, 1, 1)
            entry = jnp.where(whole, entry.astype(kept.dtype), old)
            cache[f"{name}_entry"] = grouped.append(kept, entry, at)
        return cache

    def _entries_read(self, q_BxKxGxD, cache: base.Cache, position):
        """What the entries give [B, K, G, D], and the scores of all blocks [B, K, M]."""
        c, (B, K, _, _) = self.config, q_BxKxGxD.shape
        k, v = (cache[name].astype(jnp.float32) for name in ("k_entry", "v_entry"))
        M, blocks_held = k.shape[1], -(-cache["k"].shape[1] // c.block)
        starts = np.arange(M) * c.stride
        seen = (jnp.asarray(starts, jnp.int32) + (c.span - 1) <= position)[None, None, None]
        score = jnp.einsum("bkgd,bmkd->bkgm", q_BxKxGxD.astype(jnp.float32), k) * self._scale
        p = jax.nn.softmax(score, axis=-1, where=jnp.broadcast_to(seen, score.shape))
        p = jnp.where(seen, p, 0.0)
        block = np.arange(blocks_held)[None] * c.block
        shared = np.minimum(starts[:, None] + c.span, block + c.block)
        shared = np.maximum(shared - np.maximum(starts[:, None], block), 0) / c.stride
        mass = jnp.einsum("bkgm,mj->bkj", p, jnp.asarray(shared, jnp.float32))
        return jnp.einsum("bkgm,bmkd->bkgd", p, v), mass.reshape(B, K, blocks_held)

    def _blocks_read(self, q_BxKxGxD, cache: base.Cache, score_BxKxM, position) -> jax.Array:
        """What the chosen blocks give, [B, K, G, D]."""
        c, (B, K, M) = self.config, score_BxKxM.shape
        behind = (position // c.block - jnp.arange(M))[None, None]
        forced = (behind < c.local) | (jnp.arange(M) == 0)[None, None]
        score = jnp.where(forced, jnp.inf, score_BxKxM)
        value, chosen = jax.lax.top_k(jnp.where(behind < 0, -jnp.inf, score), min(c.top_k, M))
        rows = chosen[..., None] * c.block + jnp.arange(c.block).reshape(1, 1, 1, -1)
        seen = (value > -jnp.inf)[..., None] & (rows <= position)
        rows, seen = (t.reshape(B, K, -1) for t in (rows, seen))
        at = (
            jnp.arange(B)[:, None, None], jnp.minimum(rows, cache["k"].shape[1] - 1),
            jnp.arange(K)[None, :, None],
        )
        k, v = (jnp.moveaxis(cache[name][at], 1, 2) for name in ("k", "v"))
        return self._read(q_BxKxGxD, k, v, seen[:, :, None])

    @staticmethod
    def mask(config: Config, context: base.Context):
        """Which tokens may reach each query, [B, L, L]; which do is chosen."""
        del config
        return base.causal_mask(context)

    @staticmethod
    def work(config: Config, width: int, length: int) -> base.Work:
        """Forward FLOPs per token at `length`; the scores of blocks have no backward pass."""
        c, (H, K, D) = config, config.sizes(width)
        M, entries = length // c.block, length // c.stride
        hidden = c.hidden or 2 * D
        phi = 2 * K * hidden * D * (c.span + 1) * entries / length
        keys = width * D * (H + 6 * K) + H * D * width + 3 * width * H
        near = ops.own_block_keys_per_query(length, c.block)
        near += ops.flash_keys_per_query(length, window=c.window)
        near += ops.flash_keys_per_query(length, keys=entries, stride=c.stride, span=c.span)
        near += ops.block_sparse_keys_per_query(
            length, heads=H, kv_heads=K, groups=K, block=c.block, choices=min(c.top_k - 1, M)
        )
        scored = selection.scored(c.selected, length)
        ended = np.maximum(np.arange(1, length + 1) - c.span + c.stride, 0) // c.stride
        seen = base.mean_least(length, c.top_k * c.block) + base.mean_least(length, c.window)
        each = 2 * H * D
        core = each * (2 * near + scored)
        model = each * (2 * (seen + float(ended.mean())) + scored)
        return base.Work(2 * (keys + phi), core, 5 * each * near, min(model, core))

    @staticmethod
    def cache_shapes(config: Config, width: int, batch: int, length: int) -> dict[str, tuple]:
        """What a cache of `length` tokens holds: of each branch keys and values, and the last
        tokens' before they are compressed."""
        c, (_, K, D) = config, config.sizes(width)
        rows = {
            "": length, "_window": min(length, c.window), "_tail": c.span,
            "_entry": length // c.stride,
        }
        return {n + name: (batch, S, K, D) for name, S in rows.items() for n in ("k", "v")}

    @staticmethod
    def kv_elements(config: Config, width: int) -> int:
        """Cache elements per token, an entry shared out among its stride; the window is beside."""
        _, K, D = config.sizes(width)
        return 2 * K * D + -(-2 * K * D // config.stride)
