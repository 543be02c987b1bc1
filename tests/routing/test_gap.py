"""The duality gap against the linear program: never below the true gap, none at its prices."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.routing import base
from tests.games import market

TOKENS, EXPERTS, K = 48, 8, 2
SEATS = TOKENS * K // EXPERTS


def gap_at(s, price, valid=None):
    valid = np.ones(len(s), bool) if valid is None else valid
    expert = base.top_k(jnp.asarray(s - price[None, :], jnp.float32), K)
    return float(
        base.duality_gap(
            jnp.asarray(s), jnp.asarray(price, jnp.float32), expert, jnp.asarray(valid)
        )
    )


@pytest.mark.parametrize("kind", ["random", "skewed", "one dominant expert", "clustered"])
def test_it_is_never_below_the_true_gap(kind, rng):
    s = market.scores(kind, TOKENS, EXPERTS)
    s = s - s.min() + 0.1  # scores of routers are above zero
    best, _ = market.linear_program(s, K, SEATS)
    for spread in (0.0, 0.3, 2.0):
        price = spread * rng.normal(size=EXPERTS)
        true = (market.dual(s, price, K) - best) / TOKENS
        assert gap_at(s, price) >= true - 1e-4
        assert true >= -1e-6


def test_prices_that_balance_leave_none(rng):
    # blocks of tokens that each want two experts of their own: balanced at price zero
    s = np.full((TOKENS, EXPERTS), 0.1, np.float32) + 0.01 * rng.random((TOKENS, EXPERTS))
    for t in range(TOKENS):
        s[t, 2 * (t % 4) : 2 * (t % 4) + 2] += 0.5
    s = s.astype(np.float32)
    assert abs(gap_at(s, np.zeros(EXPERTS))) < 1e-5
    assert gap_at(s, np.linspace(0, 2, EXPERTS)) > 0.1


def test_padding_does_not_count(rng):
    s = market.scores("random", TOKENS, EXPERTS) + 5
    junk = np.concatenate([s, 9 + rng.normal(size=(16, EXPERTS)).astype(np.float32)])
    price = 0.2 * rng.normal(size=EXPERTS)
    padded = gap_at(junk, price, np.arange(len(junk)) < TOKENS)
    np.testing.assert_allclose(padded, gap_at(s, price), atol=1e-4)
