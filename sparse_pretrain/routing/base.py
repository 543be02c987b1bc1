"""What every router returns, and the pieces routers share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import device


class Assignment(NamedTuple):
    """Which experts each token buys, and at what weight.

    Shapes: expert, weight [T, C]; balance [] is the router's own loss, already weighted.
    A pair whose expert is E (one past the last) is not dispatched: padding, or dropped.
    """

    expert: Int[Array, "T C"]
    weight: Float[Array, "T C"]
    balance: Float[Array, ""]


def top_k(score_TxE, k: int) -> Int[Array, "T C"]:
    """The k highest experts of each token, best first, the lower number among equals; [T, C] int32.

    On CPU the maximum is taken k times: `jax.lax.top_k` runs on one core there and takes 3 times as
    long (2048 tokens, top 3 of 16 or top 8 of 64).
    """
    if device.platform() != "cpu":
        return jax.lax.top_k(score_TxE, k)[1].astype(jnp.int32)
    experts = score_TxE.shape[1]
    column = jnp.arange(experts, dtype=jnp.int32)[None, :]
    # -inf marks experts out of reach, so those already taken need a mark of their own
    free = jnp.ones(score_TxE.shape, bool)
    chosen = []
    for _ in range(k):
        open_score = jnp.where(free, score_TxE, -jnp.inf)
        best = free & (open_score == jnp.max(open_score, axis=1, keepdims=True))
        chosen.append(jnp.min(jnp.where(best, column, experts), axis=1))
        free = free & (column != chosen[-1][:, None])
    return jnp.stack(chosen, axis=1)


@jax.custom_vjp
def take_seats(score_TxE, expert_TxC):
    """score[t, expert[t, c]], with a gradient free of scatters, which are serial on CPU."""
    return jnp.take_along_axis(score_TxE, expert_TxC, axis=1)


def _take_forward(score, expert):
    # a zero-width slice carries E and the dtype to the backward pass without keeping the scores
    return take_seats(score, expert), (expert, jnp.zeros((0, score.shape[1]), score.dtype))


def _take_backward(residuals, d_seat):
    expert, shape = residuals
    column = jnp.arange(shape.shape[1], dtype=expert.dtype)[None, :]
    total = jnp.zeros((expert.shape[0], shape.shape[1]), d_seat.dtype)
    for c in range(expert.shape[1]):
        total = total + jnp.where(expert[:, c, None] == column, d_seat[:, c, None], 0)
    return total, None


take_seats.defvjp(_take_forward, _take_backward)


def count_load(expert_TxC, experts: int) -> Float[Array, " E"]:
    """Pairs per expert, float32; pairs of expert E are not counted."""
    column = jnp.arange(experts, dtype=expert_TxC.dtype)
    total = jnp.zeros((experts,), jnp.float32)
    for c in range(expert_TxC.shape[1]):
        hit = expert_TxC[:, c, None] == column[None, :]
        total = total + jnp.sum(hit, axis=0, dtype=jnp.float32)
    return total


def sequence_balance(score_BxLxE, chosen_BxLxE, valid_BxL, top_k: int) -> Float[Array, ""]:
    """sum_i f_i P_i, mean over sequences: 1 when each sequence spreads evenly.

    f_i is the share of the sequence's pairs on expert i times E, P_i its mean normalised score.
    Source: 2412.19437 equations 17 to 20.
    """
    experts = score_BxLxE.shape[-1]
    tokens = jnp.maximum(jnp.sum(valid_BxL, axis=1), 1)[:, None]
    share = score_BxLxE / (jnp.sum(score_BxLxE, axis=-1, keepdims=True) + 1e-20)
    mean_share = jnp.sum(share * valid_BxL[:, :, None], axis=1) / tokens
    frequency = jnp.sum(chosen_BxLxE * valid_BxL[:, :, None], axis=1) / tokens
    frequency = jax.lax.stop_gradient(frequency) * (experts / top_k)
    per_sequence = jnp.sum(frequency * mean_share, axis=-1)
    # rows of padding count as 0, so that the mean over micro-batches is the mean over the batch
    return jnp.mean(per_sequence)
