"""Credit of sequences: the closed form of a linear model; sums by expert and by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.games import shapley


def test_credit_of_a_linear_model_is_its_closed_form(rng):
    """Squared errors: a row's gradient is -2 e x, so its credit 4 sum_v e_v e_z <x_v, x_z>."""
    x, v = rng.normal(size=(6, 5)), rng.normal(size=(4, 5))
    w, y, u = rng.normal(size=5), rng.normal(size=6), rng.normal(size=4)
    e, f = y - x @ w, u - v @ w
    wanted = 4 * (e[:, None] * f[None] * (x @ v.T)).sum(1)

    def loss(params, row):
        return jnp.sum((row["y"] - jnp.sum(row["x"] * params["w"][None], axis=1)) ** 2)

    params = {"w": jnp.asarray(w, jnp.float32)}
    rows, target = (
        {"x": a.astype(np.float32), "y": b.astype(np.float32)} for a, b in ((x, y), (v, u))
    )
    got, parts = jax.jit(
        lambda p: shapley.first_order(loss, p, rows, jax.grad(loss)(p, target))
    )(params)
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
    assert parts == {}
    # they sum to what all rows together are worth
    whole = np.dot(jax.grad(loss)(params, rows)["w"], jax.grad(loss)(params, target)["w"])
    np.testing.assert_allclose(np.sum(got), whole, rtol=1e-5)


def test_experts_share_a_step_by_their_own_weights(rng):
    """Sums over each expert's numbers; routers, norms and dense parts belong to none."""
    products = {
        "stack_0": {"ffn": {"w": jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32),
                            "router": jnp.ones((2, 4, 3))}, "norm": jnp.ones((2, 4))},
        "prefix_0": {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
                     "e": jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)},
    }  # fmt: skip
    dims = {
        "stack_0": {"ffn": {"w": ("N", "E", "D", "F"), "router": ("N", "D", "E")},
                    "norm": ("N", "D")},
        "prefix_0": {"w": ("E", "D"), "e": ("E", "D", "F")},
    }  # fmt: skip
    found = shapley.by_expert(products, dims)
    assert set(found) == {"stack_0", "prefix_0"}
    w, e = (np.asarray(x, np.float64) for x in (products["stack_0"]["ffn"]["w"],
                                               products["prefix_0"]["e"]))  # fmt: skip
    np.testing.assert_allclose(found["stack_0"], w.sum((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found["prefix_0"], e.sum((1, 2)), rtol=1e-5)


def test_sums_by_group():
    credit, group = np.array([1.0, 2.0, 4.0]), np.array([2, 0, 2])
    np.testing.assert_array_equal(shapley.by_group(credit, group, 4), [2.0, 0.0, 5.0, 0.0])


@pytest.mark.parametrize(
    ("values", "says"),
    [({"every": -1}, "every: must be 0 or more, got -1"), ({"tokens": 0}, "tokens: must be pos")],
)
def test_bad_settings_are_named(values, says):
    with pytest.raises(ValueError, match=says):
        shapley.Config(**values)
