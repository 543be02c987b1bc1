"""What every attention variant shares: its context, its cache and what it must state."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn
from sparse_pretrain.shapes import AnyArray, Position
from sparse_pretrain.sharding import ops


class Context(NamedTuple):
    """What a layer knows of its tokens. Shapes: [B, L]; segment 0 is padding.

    `train` says whether a router may read the batch ahead, as some do in training. `valid` [B, L]
    says which tokens count for experts and losses; None for all that are no padding.
    """

    segments: Int[AnyArray, "B L"]
    positions: Int[AnyArray, "B L"]
    tokens: Int[AnyArray, "B L"] | None = None
    train: bool = False
    valid: Bool[AnyArray, "B L"] | None = None


def causal_mask(context: Context, window: int | None = None) -> Bool[Array, "B L L"]:
    """True where query l may see key s: same document, not later, within the window."""
    segments, length = context.segments, context.segments.shape[1]

    order = jnp.arange(length)
    seen = order[:, None] >= order[None, :]
    if window is not None:
        seen = seen & (order[:, None] - order[None, :] < window)
    same = segments[:, :, None] == segments[:, None, :]
    return seen[None] & same & (segments != 0)[:, :, None]


def cached_softmax(
    score: Float[Array, "*lead S"], position: Position, window: int | None = None
) -> Float[Array, "*lead S"]:
    """Softmax of one query's scores over the cache's keys up to `position`, within the window."""
    behind = position - jnp.arange(score.shape[-1])
    seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    seen = jnp.reshape(seen, (1,) * (score.ndim - 1) + seen.shape)
    return jax.nn.softmax(jnp.where(seen, score, -jnp.inf), axis=-1)


class Attention(nn.Module):
    """A variant: `__call__(x, context)` gives the output [B, L, D].

    One that trains a part of its own, an indexer, defines `attend` and `trains_own` besides, and
    names that part's parameters, by their attributes, in `own`.
    """

    own: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def trains_own(config: Any) -> bool:
        """Whether `attend` gives a loss under this configuration."""
        del config
        return False

    def attend(
        self, x: Float[Array, "B L D"], context: Context
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L"] | None]:
        """(output, the loss that each query adds for the variant's own part, or None)."""
        return self(x, context), None


def mean_least(length: int, limit: int) -> float:
    """Mean over a document's queries of min(tokens up to the query, limit)."""
    full = min(length, limit)
    return (full * (full + 1) / 2 + (length - full) * limit) / length


class Work(NamedTuple):
    """Multiply-adds counted as 2 FLOPs, per token at a given length.

    `linear` forward products with weights; `core` and `core_backward` the attention core as
    executed, masked work included; `core_model` the forward part a causal mask leaves.
    """

    linear: float
    core: float
    core_backward: float
    core_model: float


def core_work(
    linear: float, heads: int, qk: int, v: int, length: int, window: int | None = None
) -> Work:
    """Work of blocked causal attention: key blocks past the diagonal are skipped.

    The backward pass rebuilds the scores, so it runs 3 products of the query-key width and 2 of
    the value width where the forward runs one of each.
    """
    per_key = 2 * heads * ops.flash_keys_per_query(length, window=window)
    model = 2 * heads * (qk + v) * mean_least(length, window or length)
    return Work(linear, per_key * (qk + v), per_key * (3 * qk + 2 * v), model)


Cache = dict[str, Any]
