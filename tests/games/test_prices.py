"""Price solvers against sorting, linear programs and the market's own laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.games import prices
from tests.games import market


def everyone(tokens):
    return jnp.ones((tokens,), bool)


@pytest.mark.parametrize("kind", market.KINDS)
def test_nth_largest_is_what_sorting_finds(kind):
    s = market.scores(kind, 37, 6) * np.float32(1e3)
    s[::5] = -np.inf
    s[1, 0] = 0.0
    s[2, 0] = -0.0
    ranked = -np.sort(-s, axis=0)
    find = jax.jit(prices.nth_largest)
    for rank in (1, 2, 17, 37):
        np.testing.assert_array_equal(find(s, jnp.int32(rank)), ranked[rank - 1])


@pytest.mark.parametrize("kind", market.KINDS)
@pytest.mark.parametrize(("k", "experts"), [(1, 8), (2, 8), (3, 7)])
def test_coordinate_steps_never_raise_the_dual(kind, k, experts):
    s = market.scores(kind, 8 * 7 * 4, experts)
    scores = jnp.asarray(s)
    step = jax.jit(lambda p: prices.quantile(scores, p, k, everyone(len(s))))
    price = jnp.asarray(np.random.default_rng(1).normal(size=experts), jnp.float32)
    before = market.dual(s, price, k)
    bound, _ = market.linear_program(s, k, len(s) * k / experts)
    for _ in range(8):
        price = step(price)
        after = market.dual(s, price, k)
        assert after <= before + 1e-5 * abs(before)
        assert after >= bound - 1e-4 * abs(bound)  # weak duality
        before = after
    ours = prices.dual(jnp.asarray(s), price, k, everyone(len(s)))
    np.testing.assert_allclose(ours, after / len(s), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_quantile_reaches_sampling_noise_in_three_steps(k):
    """On independent scores; fresh tokens each step, so that nothing is fitted to one batch."""
    tokens, experts = 16384, 16
    price = jnp.zeros((experts,))
    shift = np.linspace(-1, 1, experts)
    rng = np.random.default_rng(0)

    def draw():
        return jnp.asarray(rng.normal(size=(tokens, experts)) + shift, jnp.float32)

    assert market.loads(draw(), price, k).max() > 1.5 * tokens * k / experts
    step = jax.jit(prices.quantile, static_argnums=2)
    for _ in range(3):
        price = step(draw(), price, k, everyone(tokens))
    load = market.loads(draw(), price, k)
    mean = tokens * k / experts
    assert load.sum() == tokens * k
    # noise of the load itself and of the price it came from: 4.5 standard deviations of both
    noise = 4.5 * np.sqrt(2 * (1 - k / experts) / mean)
    assert load.max() / mean - 1 < noise


def test_solvers_balance_the_batch_they_are_given():
    """How near each comes, by kind; only an exact method must be optimal, see test_auction."""
    experts, tokens = 8, 512
    for kind in ("random", "one dominant expert", "skewed"):
        s = jax.nn.sigmoid(jnp.asarray(market.scores(kind, tokens, experts)))
        zero = jnp.zeros((experts,))
        answers = {
            "bip": (2, prices.bip(s, zero, 2, everyone(tokens), 16)),
            "sinkhorn": (1, prices.sinkhorn(s, 1, everyone(tokens), 0.01, 400)),
        }
        for name, (k, price) in answers.items():
            unbalanced = market.loads(s, zero, k).max()
            mean = tokens * k / experts
            bound, _ = market.linear_program(np.asarray(s), k, mean)
            load, gap = market.loads(s, price, k), market.dual(s, price, k) - bound
            allowed = max(0.25 * (unbalanced - mean), 0.1 * mean)  # "random" is even to begin with
            assert load.max() - mean < allowed, (kind, name, load)
            assert -1e-3 < gap / tokens < 0.05, (kind, name, gap)


def test_bip_is_the_published_iteration():
    s = market.scores("skewed", 40, 8)
    k, q = 2, np.zeros(8)
    for _ in range(3):
        p = np.maximum(0, np.sort(s - q, axis=1)[:, -k - 1])
        q = np.maximum(0, -np.sort(-(s - p[:, None]), axis=0)[40 * k // 8])
    got = prices.bip(jnp.asarray(s), jnp.zeros((8,)), k, everyone(40), 3)
    np.testing.assert_allclose(got, q, rtol=1e-5, atol=1e-6)


def test_sinkhorn_scales_the_plan():
    """Rows sum to k and columns to the seats, by scaling the exponential itself in float64."""
    s, k, tau = market.scores("random", 48, 6), 2, 0.5
    plan = np.exp(s.astype(np.float64) / tau)
    for _ in range(200):
        plan *= k / plan.sum(1, keepdims=True)
        plan *= 48 * k / 6 / plan.sum(0, keepdims=True)
    price = np.asarray(prices.sinkhorn(jnp.asarray(s), k, everyone(48), tau, 200), np.float64)
    wanted = -tau * np.log(plan / np.exp(s / tau))
    wanted = wanted - wanted.mean(1, keepdims=True)  # a row's own factor does not touch its order
    np.testing.assert_allclose(wanted[0], price, atol=1e-4)


def test_threshold_is_the_quantile():
    s = market.scores("random", 160, 8)
    got = prices.threshold(jnp.asarray(s), 2, everyone(160))
    demand = (s > np.asarray(got)).sum(0)
    np.testing.assert_array_equal(demand, 160 * 2 // 8)


@pytest.mark.parametrize("solver", ["quantile", "threshold", "bip", "sinkhorn", "dual"])
def test_padding_has_no_demand(solver, rng):
    s = market.scores("skewed", 64, 8)
    junk = np.concatenate([s, 50 * rng.normal(size=(9, 8)).astype(np.float32)])
    price = jnp.asarray(rng.normal(size=8), jnp.float32)
    run = {
        "quantile": lambda s, v: prices.quantile(s, price, 2, v),
        "threshold": lambda s, v: prices.threshold(s, 2, v),
        "bip": lambda s, v: prices.bip(s, price, 2, v),
        "sinkhorn": lambda s, v: prices.sinkhorn(s, 2, v),
        "dual": lambda s, v: prices.dual(s, price, 2, v),
    }[solver]
    valid = jnp.arange(73) < 64
    alone, padded = run(jnp.asarray(s), everyone(64)), run(jnp.asarray(junk), valid)
    np.testing.assert_allclose(padded, alone, rtol=1e-5, atol=1e-6)
    assert np.isfinite(run(jnp.asarray(junk), jnp.zeros((73,), bool))).all() or (
        solver == "threshold"
    )


@pytest.mark.parametrize("rule", [prices.sign, prices.proportional])
def test_rules_on_loads_push_towards_balance_and_do_not_drift(rule):
    load = jnp.asarray([[9.0, 1.0, 4.0, 2.0], [4.0, 4.0, 4.0, 4.0]])
    move = np.asarray(rule(jnp.zeros((2, 4)), load, 0.1))
    assert move[0, 0] < 0 < move[0, 1]
    np.testing.assert_allclose(move.mean(1), 0, atol=1e-7)
    np.testing.assert_array_equal(move[1], 0)
