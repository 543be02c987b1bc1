"""Blocks of tokens as sparse attentions see them: counted from each document's start."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_pretrain import spec
from sparse_pretrain.shapes import AnyArray


class Layout(NamedTuple):
    """Where the entries of packed rows lie, in row order, unused slots at the end.

    Shapes: [B, M]. `starts` and `ends` are rows of the first and the last token; `segments` is the
    document's and 0 for an unused slot, which starts at 0 and ends past the row.
    """

    starts: Int[Array, "B M"]
    ends: Int[Array, "B M"]
    segments: Int[Array, "B M"]


def layout(
    segments_BxL: Int[AnyArray, "B L"],
    positions_BxL: Int[AnyArray, "B L"],
    *,
    span: int,
    stride: int,
) -> Layout:
    """Entries of `span` tokens every `stride` tokens of a document, none cut short by its end.

    However a row is packed, entry m ends at row m * stride + span - 1 or later.

    Shapes: segments and positions [B, L] -> [B, L // stride].
    Units: tokens.
    Errors: ValueError when entries leave gaps, which more of them than L // stride could.
    """
    spec.require(1 <= stride <= span, f"span: {span} must be at least stride {stride}, and that 1")
    segments, positions = jnp.asarray(segments_BxL), jnp.asarray(positions_BxL)
    B, L = segments.shape
    M = L // stride
    width = ((0, 0), (0, span - 1))
    last_segments = jnp.pad(segments, width)[:, span - 1 :]
    last_positions = jnp.pad(positions, width)[:, span - 1 :]
    begins = (segments != 0) & (positions % stride == 0)
    begins &= (last_segments == segments) & (last_positions == positions + (span - 1))
    rank = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(begins, rank, M)  # M is outside, and dropped
    row = jnp.arange(B)[:, None]
    rows = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))

    def scattered(values, unused):
        empty = jnp.full((B, M), unused, jnp.int32)
        return empty.at[row, slot].set(values.astype(jnp.int32), mode="drop")

    return Layout(
        scattered(rows, 0), scattered(rows + (span - 1), L + span), scattered(segments, 0)
    )


def block_ids(
    segments_BxL: Int[AnyArray, "B L"], positions_BxL: Int[AnyArray, "B L"], size: int
) -> Int[Array, "B L"]:
    """Numbers that two tokens of a row share only in one block of one document; 0 is padding.

    Units: size in tokens.
    """
    spec.require(size >= 1, f"size: must be at least 1, got {size}")
    segments, positions = jnp.asarray(segments_BxL), jnp.asarray(positions_BxL)
    previous = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    begins = (segments != previous) | (positions % size == 0)
    return jnp.where(segments == 0, 0, jnp.cumsum(begins, axis=1, dtype=jnp.int32))


def in_chunks(call: Callable, parts: tuple[Any, ...], size: int) -> Any:
    """`call` on chunks of dim 1 of `parts`, one after another, the results joined."""
    L = parts[0].shape[1]
    if L <= size:
        return call(parts)
    chunks = -(-L // size)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - L), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :L]

    return jax.tree.map(join, jax.lax.map(call, tuple(cut(x) for x in parts)))
