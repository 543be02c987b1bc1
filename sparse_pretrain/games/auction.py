"""Bertsekas's auction for experts with seats: the optimal balanced assignment of one batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
) -> Result:
    """Every token bids for the k experts worth most to it, until none wants for a seat.

    A token that lacks r of its k experts bids for its r best others, each up to what makes it worth
    as much as the (r+1)-th, plus epsilon. An expert keeps its `seats` highest bids, and its price
    is the lowest of them once they are all taken. Bids are for an expert, not for one of its
    identical seats, which would bid against one another for ever.

    The total score is within epsilon x k per token of the best assignment with at most `seats`
    tokens an expert. Stops after `rounds`, when seats may still be missing; the caller sees that in
    `held`.

    Errors: assertion when k is not below the number of experts, or the seats cannot hold the pairs.
    Source: Bertsekas 1992 (transportation problems); BASE layers, 2103.16716, for k = 1.
    """
    T, E = score_TxE.shape
    assert top_k < E, f"top_k: {top_k} must be below experts {E}"
    assert seats * E >= T * top_k, f"seats: {seats} x {E} experts cannot hold {T} x {top_k} pairs"
    seats = min(seats, T)
    score = score_TxE.astype(jnp.float32)
    order = jnp.arange(E, dtype=jnp.int32)[None, :]

    def wants(bid):
        return jnp.where(valid_T, top_k - jnp.sum(bid > -jnp.inf, axis=1, dtype=jnp.int32), 0)

    def unfinished(state):
        bid, _, n = state
        return jnp.any(wants(bid) > 0) & (n < rounds)

    def one_round(state):
        bid, price, n = state
        held = bid > -jnp.inf
        value = jnp.where(held, -jnp.inf, score - price[None, :])
        ranked, expert = jax.lax.top_k(value, E)
        missing = wants(bid)[:, None]
        # what the best expert that it does not ask for is worth; where none is left, as much as it
        floor = jnp.take_along_axis(ranked, jnp.minimum(missing, E - 1), axis=1)
        floor = jnp.where(floor > -jnp.inf, floor, ranked)
        asks_ranked = (order < missing) & (ranked > -jnp.inf)
        offer_ranked = jnp.where(asks_ranked, ranked - floor + epsilon, -jnp.inf)
        row = jnp.arange(T, dtype=jnp.int32)[:, None]
        offer = jnp.full((T, E), -jnp.inf).at[row, expert].set(offer_ranked)
        new = jnp.where(held, bid, price[None, :] + offer)
        # the highest `seats` bids of every expert, the lower token among equals
        best, token = jax.lax.top_k(new.T, seats)
        kept = jnp.full((E, T), -jnp.inf)
        kept = kept.at[jnp.arange(E, dtype=jnp.int32)[:, None], token].set(best).T
        full = best[:, -1] > -jnp.inf
        return kept, jnp.where(full, best[:, -1], price), n + 1

    start = (jnp.full((T, E), -jnp.inf), jnp.zeros((E,), jnp.float32), jnp.int32(0))
    return Result(*jax.lax.while_loop(unfinished, one_round, start))
