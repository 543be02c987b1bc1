"""Which past blocks the heads of a group read, by their attention to compressed entries (NSA)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_pretrain.attention import base, blocks

SCORES = 1 << 20  # scores held at once
# Of a row; the queries of each are scored against the blocks up to its end. Short rows are not
# cut: compiling a piece costs more than it saves.
PIECES, SHORTEST = 4, 256


class Sizes(NamedTuple):
    """Entries of `span` tokens every `stride`; `top_k` blocks in all, `local` the last of them.

    Units: span, stride and block in tokens.
    """

    span: int
    stride: int
    block: int
    top_k: int
    local: int

    @property
    def per_block(self) -> int:
        """Entries that begin in a block."""
        return self.block // self.stride

    def overlap(self, offset: int) -> int:
        """Tokens, in strides, that block 0 shares with the entry that begins `offset` strides in.

        An entry of a block before has a negative offset.
        """
        last = min(offset + self.span // self.stride, self.per_block)
        return max(last - max(offset, 0), 0)


class Past(NamedTuple):
    """The blocks of a row, and where its queries stand among them.

    Shapes: `first` and `own` [B, L], the slots of the query's document's first block and of the
    block it stands in, where that is whole; equal for padding.
    """

    layout: blocks.Layout
    first: Int[Array, "B L"]
    own: Int[Array, "B L"]


def past_of(context: base.Context, size: int) -> Past:
    """The blocks of `size` tokens of packed rows."""
    layout = blocks.layout(context.segments, context.positions, span=size, stride=size)
    rows = jnp.arange(context.segments.shape[1], dtype=jnp.int32)[None]
    first = _before(layout, rows - context.positions)
    past = jnp.where(context.segments != 0, context.positions // size, 0)
    return Past(layout, first, first + past.astype(jnp.int32))


def _before(layout: blocks.Layout, rows_BxN: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """How many slots end before each row; unused ones end past the last."""
    return jax.vmap(jnp.searchsorted)(layout.ends, rows_BxN).astype(jnp.int32)


def entries_of(chunks: blocks.Layout, sizes: Sizes, length: int) -> blocks.Layout:
    """Entries in the slots of the strides they begin with, unused where the document ends first.

    `chunks` is the layout of whole strides. Every entry ends as late as `blocks.layout` promises.
    """
    more = sizes.span // sizes.stride - 1

    def last(x):
        return jnp.pad(x, ((0, 0), (0, more)))[:, more:]

    whole = (chunks.segments != 0) & (last(chunks.segments) == chunks.segments)
    whole &= last(chunks.starts) == chunks.starts + more * sizes.stride
    return blocks.Layout(
        chunks.starts,
        jnp.where(whole, chunks.starts + (sizes.span - 1), length + sizes.span),
        jnp.where(whole, chunks.segments, 0),
    )


def choose(
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxMxKxD: Float[Array, "B M K D"],
    lse_BxLxH: Float[Array, "B L H"],
    chunks: blocks.Layout,
    past: Past,
    sizes: Sizes,
    scale: float,
) -> Int[Array, "B L K N"]:
    """Slots of the whole blocks before its own that each group of heads reads; -1 for none.

    The document's first block and the last local - 1 are always among them; the others are those
    of the largest score: the softmax over entries, whose denominator is exp(lse), times what
    entry and block share, summed over entries and heads. Of equal scores the earlier block is
    chosen; equal are scores that agree in float32 but for the last bits, as many as number the
    blocks. No gradient passes.

    Shapes: k [B, M, K, D], the entries in the slots of `chunks`; M is 0 where there are none.
    """
    B, L, H = q_BxLxHxD.shape[:3]
    K, M = k_BxMxKxD.shape[2], past.layout.starts.shape[1]
    first, own = past.first, past.own
    chosen = [jnp.where(own - first >= sizes.local, first, -1)]
    for back in range(1, min(sizes.local, M + 1)):
        chosen.append(jnp.where(own - back >= first, own - back, -1))
    forced = jnp.stack(chosen, axis=-1)[:, :, None]
    forced = jnp.broadcast_to(forced, (B, L, K, len(chosen)))
    rest = min(sizes.top_k - 1 - sizes.local, M - sizes.local)
    if rest <= 0:
        return forced
    q, k, lse = jax.lax.stop_gradient((q_BxLxHxD, k_BxMxKxD, lse_BxLxH))
    pieces = []
    for start, stop in spans(L, sizes.block):
        m = min(stop // sizes.block, M)  # however a row is packed, no more blocks end before
        if m <= sizes.local:
            pieces.append(jnp.full((B, stop - start, K, rest), -1, jnp.int32))
            continue
        score = _Score(k, chunks, past.layout, m, L, sizes, scale)

        def best(part, score=score):
            q, lse, first, own, row = part
            return _best(score(q, lse, row, first), first, own, rest, sizes.local)

        row = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
        parts = tuple(t[:, start:stop] for t in (q, lse, first, own, row))
        size = max(SCORES // (B * H * m * sizes.per_block) // 64 * 64, 64)
        pieces.append(blocks.in_chunks(best, parts, size))
    return jnp.concatenate([forced, jnp.concatenate(pieces, axis=1)], axis=-1)


def spans(length: int, block: int) -> list[tuple[int, int]]:
    """The pieces of a row, whole blocks each but the last."""
    size = max(-(-length // (PIECES * block)), -(-SHORTEST // block)) * block
    return [(start, min(start + size, length)) for start in range(0, length, size)]


class _Score:
    """Scores of the first m blocks. Letters: C entries of a block, Q queries, G heads of a group.

    The queries are the last dim, so that what is reduced and compared never is; entries stand
    by their place in a block first, so that a block's are added up slice by slice.
    """

    def __init__(self, k, chunks: blocks.Layout, layout: blocks.Layout, m, length, sizes, scale):
        self.sizes, self.scale, self.m = sizes, scale, m
        B, M, K, D = k.shape
        C = sizes.per_block
        entries = entries_of(chunks, sizes, length)
        slot = _before(chunks, layout.starts[:, :m])[:, None] + jnp.arange(C, dtype=jnp.int32)[
            None, :, None
        ]
        slot = jnp.minimum(slot, M - 1).reshape(B, C * m)
        used = jnp.broadcast_to((layout.segments[:, None, :m] != 0), (B, C, m)).reshape(B, C * m)
        ends = jnp.take_along_axis(entries.ends, slot, axis=1)
        self.ends = jnp.where(used, ends, length + sizes.span)
        self.block = jnp.tile(jnp.arange(m, dtype=jnp.int32), C)
        keys = jnp.take_along_axis(k, slot[:, :, None, None], axis=1)
        self.keys = keys.transpose(0, 2, 1, 3).reshape(B * K, C * m, D)

    def __call__(self, q, lse, row, first) -> Float[Array, "B K m Q"]:
        """q [B, Q, H, D], lse [B, Q, H], the queries' rows and first blocks [B, Q]."""
        B, Q, H, D = q.shape
        K, U = self.keys.shape[0] // B, self.keys.shape[1]
        C, G = U // self.m, H // K
        q = q.reshape(B, Q, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B * K, G * Q, D)
        raw = jnp.einsum("nud,nrd->nur", self.keys, q, preferred_element_type=lse.dtype)
        raw = raw.reshape(B, K, U, G, Q)
        lse = lse.reshape(B, Q, K, G).transpose(0, 2, 3, 1)
        p = jnp.exp(raw * np.asarray(self.scale, raw.dtype) - lse[:, :, None])
        # what is not seen may have added up to infinity
        seen = self.ends[:, :, None] <= row[:, None]
        seen &= self.block[None, :, None] >= first[:, None]
        p = jnp.where(seen[:, None], jnp.sum(p, axis=3), 0)
        p = p.reshape(B, K, C, self.m, Q)
        score = jnp.zeros((B, K, self.m, Q), p.dtype)
        for back in range(-(-(self.sizes.span // self.sizes.stride - 1) // C) + 1):
            shift = min(back, self.m)
            for place in range(C):
                share = self.sizes.overlap(place - back * C)
                if share:
                    moved = jnp.pad(p[:, :, place], ((0, 0), (0, 0), (shift, 0), (0, 0)))
                    score = score + moved[:, :, : self.m] * np.asarray(share, p.dtype)
        return score


def _best(score_BxKxmxQ, first_BxQ, own_BxQ, count: int, local: int) -> Int[Array, "B Q K N"]:
    """The blocks of the largest scores between the first and the local ones.

    A score that is not negative is in order as an integer too. Its last bits give way to the
    block's number, so that no two are equal and the largest names its block.
    """
    m = score_BxKxmxQ.shape[2]
    low = (1 << max(m - 1, 1).bit_length()) - 1
    block = jnp.arange(m, dtype=jnp.int32)[None, :, None]
    free = (block > first_BxQ[:, None]) & (block <= own_BxQ[:, None] - local)
    bits = jax.lax.bitcast_convert_type(score_BxKxmxQ.astype(jnp.float32), jnp.int32)
    keys = jnp.where(free[:, None], (bits & ~low) | (low - block)[None], -1)

    def next_best(top, _):
        top = jnp.max(jnp.where(keys < top[:, :, None], keys, -1), axis=2)
        return top, top

    above = jnp.full_like(keys[:, :, 0], jnp.iinfo(jnp.int32).max)
    top = jax.lax.scan(next_best, above, None, length=count)[1]
    return jnp.where(top < 0, -1, low - (top & low)).transpose(1, 3, 2, 0)


def scored(sizes: Sizes, length: int) -> float:
    """Entries that a query is scored against for its choice, on average, as executed."""
    M = length // sizes.block
    if min(sizes.top_k - 1, M) <= sizes.local:
        return 0.0
    total = 0
    for start, stop in spans(length, sizes.block):
        m = min(stop // sizes.block, M)
        total += (stop - start) * m * sizes.per_block * (m > sizes.local)
    return total / length
