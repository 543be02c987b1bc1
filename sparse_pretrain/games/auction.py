"""Bertsekas's auction for experts with seats: the optimal balanced assignment of one batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain.games import prices


class Result(NamedTuple):
    """Shapes: bid [T, E], -inf where token t does not hold expert e; price [E]; rounds []."""

    bid: Float[Array, "T E"]
    price: Float[Array, " E"]
    rounds: Int[Array, ""]

    @property
    def held(self) -> Bool[Array, "T E"]:
        """Whether token t has a seat of expert e."""
        return self.bid > -jnp.inf


def auction(
    score_TxE: Float[Array, "T E"],
    top_k: int,
    seats: int,
    valid_T: Bool[Array, " T"],
    *,
    epsilon: float = 1e-3,
    rounds: int = 100_000,
    start_E: Float[Array, " E"] | None = None,
) -> Result:
    """Every token bids for the k experts worth most to it, until none wants for a seat.

    A token that lacks r of its k experts bids for its r best others, each up to what makes it worth
    as much as the (r+1)-th, plus epsilon. An expert keeps its `seats` highest bids, and its price
    is the lowest of them once they are all taken. Bids are for an expert, not for one of its
    identical seats, which would bid against one another for ever.

    The total score is within epsilon x k per token of the best assignment with at most `seats`
    tokens an expert. `start_E` are the prices bidding begins at, 0 without; with them the bound
    holds only where every seat is taken in the end. Stops after `rounds`, when seats may still be
    missing; the caller sees that in `held`.

    Errors: assertion when k is not below the number of experts, or the seats cannot hold the pairs.
    Source: Bertsekas 1992 (transportation problems); BASE layers, 2103.16716, for k = 1.
    """
    T, E = score_TxE.shape
    assert top_k < E, f"top_k: {top_k} must be below experts {E}"
    assert seats * E >= T * top_k, f"seats: {seats} x {E} experts cannot hold {T} x {top_k} pairs"
    seats = min(seats, T)
    score = score_TxE.astype(jnp.float32)

    def wants(bid):
        return jnp.where(valid_T, top_k - jnp.sum(bid > -jnp.inf, axis=1, dtype=jnp.int32), 0)

    def unfinished(state):
        bid, _, n = state
        return jnp.any(wants(bid) > 0) & (n < rounds)

    def one_round(state):
        bid, price, n = state
        held = bid > -jnp.inf
        value = jnp.where(held, -jnp.inf, score - price[None, :])
        asks, floor = _best(value, wants(bid), top_k)
        offer = jnp.where(asks, value - floor[:, None] + epsilon, -jnp.inf)
        kept, lowest = _highest(jnp.where(held, bid, price[None, :] + offer), seats)
        return kept, jnp.where(lowest > -jnp.inf, lowest, price), n + 1

    price = jnp.zeros((E,), jnp.float32) if start_E is None else start_E.astype(jnp.float32)
    start = (jnp.full((T, E), -jnp.inf), price, jnp.int32(0))
    return Result(*jax.lax.while_loop(unfinished, one_round, start))


def _best(value_TxE, count_T, most: int):
    """(every token's `count_T` best experts [T, E], the best value of the others [T]).

    Where no other is left, the least value among those it has. As many maxima as the largest count,
    in place of a sort, which runs on one core of a CPU.
    """
    column = jnp.arange(value_TxE.shape[1], dtype=jnp.int32)[None, :]
    left, taken = value_TxE, jnp.zeros(value_TxE.shape, bool)
    floor = jnp.full(value_TxE.shape[:1], jnp.inf)
    for c in range(most + 1):
        top = jnp.max(left, axis=1)
        floor = jnp.where((c <= count_T) & (top > -jnp.inf), top, floor)
        if c < most:
            first = jnp.min(jnp.where(left == top[:, None], column, column.shape[1]), axis=1)
            hit = (column == first[:, None]) & (top > -jnp.inf)[:, None]
            taken = taken | (hit & (c < count_T)[:, None])
            left = jnp.where(hit, -jnp.inf, left)
    return taken, floor


def _highest(bid_TxE, seats: int):
    """(the `seats` highest bids of every expert, -inf elsewhere; the lowest of them once full).

    Among equal bids the lower token's counts.
    """
    T = bid_TxE.shape[0]
    lowest = prices.nth_largest(bid_TxE, jnp.int32(seats))
    tied = (bid_TxE == lowest[None, :]) & (lowest > -jnp.inf)[None, :]
    above = bid_TxE > lowest[None, :]
    room = seats - jnp.sum(above, axis=0, dtype=jnp.int32)
    token = jnp.arange(T, dtype=jnp.int32)[:, None]

    def first_tied(_):  # the last token of the first `room` tied ones, by halving
        def body(_, ends):
            low, high = ends
            middle = (low + high) // 2
            enough = jnp.sum(tied & (token <= middle[None, :]), axis=0, dtype=jnp.int32) >= room
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        zero = jnp.zeros((bid_TxE.shape[1],), jnp.int32)
        return jax.lax.fori_loop(0, T.bit_length(), body, (zero, zero + (T - 1)))[1]

    crowded = jnp.any(jnp.sum(tied, axis=0, dtype=jnp.int32) > room)
    last = jax.lax.cond(
        crowded, first_tied, lambda _: jnp.full((bid_TxE.shape[1],), T, jnp.int32), None
    )
    kept = above | (tied & (token <= last[None, :]))
    return jnp.where(kept, bid_TxE, -jnp.inf), lowest
