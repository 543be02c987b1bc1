"""Accumulated gradients equal the large batch's; the moving average equals its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import optim
from sparse_pretrain.optim import ema


def sums(params, batch):
    """Summed weighted squared error of a two-layer net, its gradient, weights and a count."""

    def loss(p):
        hidden = jnp.tanh(batch["x"] @ p["a"])
        error = (hidden @ p["b"] - batch["y"]) ** 2
        return jnp.sum(error * batch["w"][:, None])

    value, grads = jax.value_and_grad(loss)(params)
    return {
        "loss": value,
        "grads": grads,
        "weight": jnp.sum(batch["w"]),
        "rows": jnp.sum(batch["w"] > 0, dtype=jnp.int32),
    }


@pytest.fixture
def problem(rng):
    f = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    params = {"a": f(6, 8), "b": f(8, 2)}
    weights = jnp.asarray(rng.uniform(size=24) ** 4, jnp.float32).at[::5].set(0.0)
    return params, {"x": f(24, 6), "y": f(24, 2), "w": weights}


@pytest.mark.parametrize("count", [1, 2, 3, 8, 24])
def test_equals_the_large_batch(problem, count):
    params, batch = problem
    want = sums(params, batch)
    got = jax.jit(lambda p, b: optim.accumulate(sums, p, optim.split(b, count)))(params, batch)
    assert got["rows"] == want["rows"]
    assert got["rows"].dtype == jnp.int32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    mean = lambda s: optim.divide(s["grads"], s["weight"])  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mean(got), mean(want)
    )


def test_averaging_the_parts_would_not(problem):
    """The mistake this guards against is not invisible here."""
    params, batch = problem
    parts = optim.split(batch, 3)
    means = []
    for i in range(3):
        s = sums(params, {k: v[i] for k, v in parts.items()})
        means.append(optim.divide(s["grads"], s["weight"])["a"])
    whole = sums(params, batch)
    want = optim.divide(whole["grads"], whole["weight"])["a"]
    assert float(jnp.abs(sum(means) / 3 - want).max()) > 1e-2


def test_split_deals_rows_out_in_turn():
    parts = optim.split({"x": jnp.arange(6)}, 2)["x"]
    np.testing.assert_array_equal(parts, [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("count", [0, 5])
def test_split_refuses(count):
    with pytest.raises(ValueError, match=rf"{count} micro-batches do not divide 24 rows"):
        optim.split({"x": jnp.zeros(24)}, count)


def test_no_target_gives_zero():
    np.testing.assert_array_equal(optim.divide(jnp.ones(3), jnp.float32(0.0)), 0.0)


def test_ema(rng):
    xs = [jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for _ in range(9)]
    average = ema.init({"w": xs[0]})
    for x in xs[1:]:
        average = jax.jit(ema.update)(average, {"w": x}, 0.9)
    want = 0.9**8 * np.float64(xs[0])
    for i, x in enumerate(xs[1:]):
        want += 0.1 * 0.9 ** (7 - i) * np.float64(x)
    np.testing.assert_allclose(average["w"], want, rtol=1e-5, atol=1e-6)


def test_ema_of_a_constant_is_that_constant(rng):
    p = {"w": jnp.asarray(rng.normal(size=(50,)), jnp.float32)}
    average = ema.init(p)
    for _ in range(3):
        average = ema.update(average, p, 0.999)
    np.testing.assert_array_equal(average["w"], p["w"])


def test_warmed_decay():
    assert float(ema.warmed(0.999, jnp.int32(0))) == pytest.approx(0.1)
    assert float(ema.warmed(0.999, jnp.int32(10**6))) == pytest.approx(0.999)
