"""One step: accumulation equals the large batch, prices move once, nothing moves twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import optim
from sparse_pretrain.games import prices
from sparse_pretrain.model import lm
from sparse_pretrain.training import state, step
from tests.model.conftest import packed, small


def _setup(config, accumulate=1, ema=0.0, domains=0):
    definition = lm.define(config)
    table = optim.TABLE["adamw"]

    def schedule(n):
        return jnp.asarray(1e-3, jnp.float32)

    tx = table.build(table.Config(lr=1e-3), definition.dims, schedule)
    fresh = state.create(definition, tx, 0, ema=ema > 0)
    run = step.make_train_step(
        definition, config, tx, schedule=schedule, accumulate=accumulate, ema=ema, domains=domains
    )
    return definition, fresh, run


def _close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_large_batch(accumulate, rng):
    batch = packed(rng, rows=8)  # weights are uneven: the last row ends in padding
    definition, fresh, _ = _setup(small(prefix=(), pattern=("mixed",)))
    gradients = jax.jit(step.gradients, static_argnums=(0, 3))
    grads, report = gradients(definition, fresh, batch, 1)
    parts, summed = gradients(definition, fresh, batch, accumulate)
    _close(grads, parts, 1e-6)
    _close(report, summed, 1e-3)


# All that could move a price twice, at once; one after the other they are slow.
@pytest.mark.parametrize(
    ("accumulate", "changes"),
    [
        (2, {"scan": False, "remat": "full"}),
        *(
            pytest.param(accumulate, changes, marks=pytest.mark.slow)
            for accumulate, changes in [
                (1, {}), (1, {"remat": "full"}), (1, {"scan": False}),
                (2, {}), (2, {"remat": "full"}), (2, {"scan": False}),
            ]
        ),
    ],
)
def test_prices_move_once_per_step_whatever_is_recomputed(accumulate, changes, rng):
    """One step changes each bias by exactly rate * (sign - mean sign) of that step's load."""
    batch = packed(rng, rows=8)
    config = small(prefix=(), pattern=("mixed",), **changes)
    _, fresh, run = _setup(config, accumulate=accumulate)
    before = jax.tree.map(np.asarray, fresh.router)
    after, out = run(fresh, batch)
    for group, load in out["load"].items():
        load = np.asarray(load, np.float64)
        sign = np.sign(load.mean(-1, keepdims=True) - load)
        move = 0.01 * (sign - sign.mean(-1, keepdims=True))
        bias = after.router[group]["ffn"]["router"]["bias"]
        expected = before[group]["ffn"]["router"]["bias"] + move
        np.testing.assert_allclose(bias, expected, atol=1e-7)
        assert np.abs(move).max(-1).min() > 0  # every layer had something to correct


@pytest.fixture(scope="module")
def one_of_each():
    """(a fresh state as numpy arrays, its step): three layers, and an average of the parameters."""
    _, fresh, run = _setup(small(repeats=1), ema=0.5)
    # the key stays out: it is of no dtype that numpy knows, and a step leaves it alone
    return jax.tree.map(np.asarray, fresh._replace(key=None)), run, fresh.key


def _fresh(one_of_each):
    held, run, key = one_of_each
    return jax.tree.map(jnp.array, held)._replace(key=jnp.copy(key)), run


def test_balance_law_over_many_steps(one_of_each):
    """Every layer's bias moves, MaxVio falls, the mean bias stays, the gradient has no share."""
    train_state, run = _fresh(one_of_each)
    loads = []
    batches = [packed(np.random.default_rng(i), rows=16) for i in range(8)]
    for n in range(80):
        train_state, out = run(train_state, batches[n % 8])
        loads.append([np.asarray(x, np.float64) for x in jax.tree.leaves(out["load"])])

    def violation(rounds):
        # over all eight batches: one alone is small, and its MaxVio is mostly sampling noise
        totals = [np.sum(layer, axis=0) for layer in zip(*rounds, strict=True)]
        return np.mean([(x.max(-1) / x.mean(-1) - 1).mean() for x in totals])

    before, after = violation(loads[:8]), violation(loads[-8:])
    assert after < 0.6 * before, (before, after)
    for bias in jax.tree.leaves(train_state.router):
        assert np.abs(np.asarray(bias)).max(-1).min() > 0.005
        np.testing.assert_allclose(np.asarray(bias).mean(-1), 0, atol=1e-6)


def test_sign_rule_against_a_loop(rng):
    bias, load = rng.normal(size=(3, 5)), rng.integers(0, 9, (3, 5)).astype(np.float64)
    ours = prices.sign(jnp.asarray(bias, jnp.float32), jnp.asarray(load, jnp.float32), 0.5)
    for n in range(3):
        moves = [np.sign(load[n].mean() - x) for x in load[n]]
        expected = [b + 0.5 * (m - np.mean(moves)) for b, m in zip(bias[n], moves, strict=True)]
        np.testing.assert_allclose(ours[n], expected, atol=1e-6)


def test_average_follows_the_parameters(one_of_each, rng):
    batch = packed(rng, rows=16)
    fresh, run = _fresh(one_of_each)
    start = jax.tree.map(np.array, fresh.params)
    after, _ = run(fresh, batch)
    decay = min(0.5, 1 / 10)
    for a, b, e in zip(*map(jax.tree.leaves, (start, after.params, after.ema)), strict=True):
        np.testing.assert_allclose(e, decay * a + (1 - decay) * np.asarray(b), atol=1e-6)


def test_loss_falls_on_a_batch_seen_again(one_of_each, rng):
    batch = packed(rng, rows=16)
    train_state, run = _fresh(one_of_each)
    losses = []
    for _ in range(40):
        train_state, out = run(train_state, batch)
        losses.append(float(out["loss"]))
    assert abs(losses[0] - np.log(61)) < 0.2
    assert losses[-1] < losses[0] - 0.3
