"""The auction against linear programming, the assignment problem and optax's Hungarian method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_pretrain.games.auction import auction
from tests.games import market

run = jax.jit(auction, static_argnums=(1, 2), static_argnames=("epsilon", "rounds"))


def settled(s, k, seats, valid=None, **options):
    valid = np.ones(len(s), bool) if valid is None else valid
    got = run(jnp.asarray(s), k, seats, jnp.asarray(valid), **options)
    held = np.asarray(got.held)
    np.testing.assert_array_equal(held.sum(1), np.where(valid, k, 0))
    assert held.sum(0).max() <= seats
    return got, (s * held).sum(dtype=np.float64)


@pytest.mark.parametrize("kind", market.KINDS)
@pytest.mark.parametrize(
    ("k", "experts", "seats"),
    [(1, 8, 6), (2, 8, 12), (3, 8, 18), (2, 7, 14), (1, 8, 9), (5, 8, 31)],
)
def test_no_assignment_is_better(kind, k, experts, seats):
    s = market.scores(kind, 48, experts)
    epsilon = 1e-3
    got, total = settled(s, k, seats, epsilon=epsilon)
    best, _ = market.linear_program(s, k, seats)
    assert best - epsilon * k * 48 - 1e-3 <= total <= best + 1e-3
    price = np.asarray(got.price, np.float64)
    # prices prove it: the dual at these prices is no more than epsilon a pair above the primal
    dual = np.sort(s - price, axis=1)[:, -k:].sum() + seats * price.sum()
    assert dual - total <= epsilon * k * 48 + 1e-3
    assert (price[np.asarray(got.held).sum(0) < seats] == 0).all()


@pytest.mark.parametrize("kind", market.KINDS)
def test_one_expert_each_equals_the_assignment_problem(kind):
    s = market.scores(kind, 24, 6)
    _, total = settled(s, 1, 4, epsilon=1e-3)
    np.testing.assert_allclose(total, market.best_assignment(s, 4), atol=24e-3 + 1e-3)
    rows, columns = optax.assignment.hungarian_algorithm(-jnp.repeat(jnp.asarray(s), 4, axis=1))
    np.testing.assert_allclose(total, s[rows, columns // 4].sum(), atol=24e-3 + 1e-3)


def test_padding_bids_for_nothing(rng):
    s = market.scores("random", 40, 8)
    junk = np.concatenate([s, 9 * rng.normal(size=(8, 8)).astype(np.float32)])
    _, alone = settled(s, 2, 12)
    _, padded = settled(junk, 2, 12, np.arange(48) < 40)
    np.testing.assert_allclose(padded, alone, atol=0.1)


def test_an_interrupted_auction_leaves_seats_open():
    s = market.scores("one dominant expert", 48, 8)
    got = run(jnp.asarray(s), 1, 6, jnp.ones((48,), bool), rounds=1)
    assert np.asarray(got.held).sum() < 48
    assert got.rounds == 1


def test_too_few_seats_are_our_mistake():
    with pytest.raises(AssertionError, match="cannot hold"):
        auction(jnp.zeros((8, 4)), 2, 3, jnp.ones((8,), bool))


@pytest.mark.parametrize("kind", market.KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_from_prices_that_are_wrong_it_still_ends_at_the_best(kind, k, rng):
    s = market.scores(kind, 48, 8)
    start = jnp.asarray(rng.uniform(0, np.ptp(s), 8), jnp.float32)
    got, total = settled(s, k, 6 * k, epsilon=1e-3, start_E=start)  # every seat is taken
    assert (np.asarray(got.held).sum(0) == 6 * k).all()
    best, _ = market.linear_program(s, k, 6 * k)
    assert best - 1e-3 * k * 48 - 1e-3 <= total <= best + 1e-3
