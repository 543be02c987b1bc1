"""The DeepSeek-V3 router against its equations, written out token by token in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import nn
from sparse_pretrain.games import prices
from sparse_pretrain.routing.sigmoid_bias import Config, SigmoidBias

WIDTH, EXPERTS, SEATS = 12, 8, 3


def by_hand(x, w, bias, config, valid):
    """(experts, weights, balance) of 2412.19437, equations 12 to 20, a token at a time."""
    experts, weights, balance = [], [], []
    for row, real in zip(x, valid, strict=True):
        share, count = np.zeros(EXPERTS), np.zeros(EXPERTS)
        for token, counts in zip(row, real, strict=True):
            score = 1 / (1 + np.exp(-(token @ w)))
            wanted = score + bias
            size = EXPERTS // config.groups
            best = [np.sort(wanted[g * size :][:size])[-2:].sum() for g in range(config.groups)]
            kept = np.argsort(best)[::-1][: config.groups_kept]
            open_ = [e for e in range(EXPERTS) if e // size in kept]
            chosen = sorted(open_, key=lambda e: -wanted[e])[:SEATS]
            total = score[chosen].sum() if config.normalise else 1.0
            experts.append(chosen if counts else [EXPERTS] * SEATS)
            weights.append(config.scale * score[chosen] / total)
            if counts:
                share += score / score.sum()
                count[chosen] += 1
        tokens = max(real.sum(), 1)
        balance.append((count * EXPERTS / (SEATS * tokens) * (share / tokens)).sum())
    return np.array(experts), np.array(weights), config.balance * np.mean(balance)


@pytest.mark.parametrize(
    "config",
    [
        Config(balance=0.1),
        Config(balance=0.1, normalise=False, scale=2.5),
        Config(groups=4, groups_kept=2, scale=1.5),
        Config(groups=2, groups_kept=1),
    ],
)
def test_it_is_the_equations(config, rng):
    definition = nn.define(lambda keys: SigmoidBias(config, WIDTH, EXPERTS, SEATS, keys))
    params, _ = definition.init(jax.random.key(0))
    x = rng.normal(size=(2, 20, WIDTH)).astype(np.float32)
    valid = np.ones((2, 20), bool)
    valid[1, 13:] = False
    # negative biases too: a dropped group must not win against them
    bias = rng.normal(size=EXPERTS).astype(np.float32) - 0.5
    router = definition.merge(params, {"bias": jnp.asarray(bias)})
    got = router(jnp.asarray(x), jnp.asarray(valid))
    experts, weights, balance = by_hand(
        x.astype(np.float64), np.asarray(params["w"], np.float64), bias, config, valid
    )
    order = np.argsort(np.asarray(got.expert), axis=1)
    wanted = np.argsort(experts, axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(got.expert), order, 1),
        np.take_along_axis(experts, wanted, 1),
    )
    real = valid.reshape(-1)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(got.weight), order, 1)[real],
        np.take_along_axis(weights, wanted, 1)[real],
        rtol=1e-5,
    )
    np.testing.assert_allclose(got.balance, balance, rtol=1e-5)


def test_the_bias_moves_by_the_sign_and_keeps_its_mean(rng):
    bias = rng.normal(size=(3, 8)).astype(np.float32)
    load = rng.integers(0, 50, (3, 8)).astype(np.float32)
    load[1] = 7.0  # even: nothing moves
    moved = np.asarray(prices.sign(jnp.asarray(bias), jnp.asarray(load), 0.01))
    for before, after, row in zip(bias, moved, load, strict=True):
        step = 0.01 * np.sign(row.mean() - row)
        np.testing.assert_allclose(after - before, step - step.mean(), atol=1e-6)
    np.testing.assert_array_equal(moved[1], bias[1])
    np.testing.assert_allclose(moved.mean(1), bias.mean(1), atol=1e-6)
    np.testing.assert_allclose(
        prices.max_violation(jnp.asarray(load)), load.max(1) / load.mean(1) - 1, atol=1e-6
    )


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="experts 8 is not a multiple of groups 3"):
        Config(groups=3).check(8, 2)
    with pytest.raises(ValueError, match="top_k: 3 exceeds the 2 experts"):
        Config(groups=4).check(8, 3)
    with pytest.raises(ValueError, match="groups_kept: 3 exceeds groups 2"):
        Config(groups=2, groups_kept=3)
