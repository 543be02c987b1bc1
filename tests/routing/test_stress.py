"""256 experts on 8 simulated devices, eight a token, skewed: 200 steps lose no pair and no number.

The mixture learns to copy a fixed random map; tokens come from a Zipf distribution over 64 kinds,
so that most pairs go to few experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_pretrain.games import prices
from sparse_pretrain.optim import adamw
from sparse_pretrain.routing import base, expert_parallel, experts

E, C, D, F, T, DEVICES = 256, 8, 32, 16, 512, 8
ROWS = PartitionSpec("expert")


def kinds(rng):
    weight = 1 / np.arange(1, 65) ** 1.5
    return rng.choice(64, T, p=weight / weight.sum())


@pytest.mark.slow
def test_two_hundred_steps_lose_nothing():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("expert",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    table, goal = (jnp.asarray(rng.normal(size=(64, D)), jnp.float32) for _ in range(2))
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = experts.Weights(
        *(jnp.asarray(rng.normal(size=s) / np.sqrt(s[1]), jnp.float32) for s in shapes)
    )
    params = {"router": jnp.asarray(rng.normal(size=(D, E)) / 8, jnp.float32), "experts": weights}
    params["experts"] = jax.device_put(weights, NamedSharding(mesh, ROWS))
    run = jax.shard_map(
        functools.partial(expert_parallel.exchanged, axis="expert"),
        mesh=mesh,
        in_specs=(ROWS,) * 4,
        out_specs=ROWS,
        check_vma=False,
    )
    rule = adamw.standard_promotion(optax.adam(3e-3))

    def loss_of(params, bias, kind):
        x = table[kind]
        score = jax.nn.sigmoid(x @ params["router"])
        expert = base.top_k(jax.lax.stop_gradient(score) + bias[None, :], C)
        weight = base.take_seats(score, expert)
        y = run(params["experts"], x, expert, weight / weight.sum(1, keepdims=True))
        return jnp.mean(jnp.square(y - goal[kind])), (base.count_load(expert, E), y)

    @jax.jit
    def step(params, opt, bias, kind):
        (loss, (load, y)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, bias, kind)
        updates, opt = rule.update(grads, opt, params)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        bias = prices.sign(bias, load, 0.003)
        return optax.apply_updates(params, updates), opt, bias, loss, load, y, finite

    opt, bias, losses, worst = rule.init(params), jnp.zeros((E,)), [], []
    for n in range(200):
        kind = jnp.asarray(kinds(rng))
        # what no expert parallel says of the same parameters
        if n in (0, 100, 199):
            x = table[kind]
            score = jax.nn.sigmoid(x @ params["router"])
            expert = base.top_k(score + bias[None, :], C)
            weight = base.take_seats(score, expert)
            share = weight / weight.sum(1, keepdims=True)
            alone = experts.run(jax.device_get(params["experts"]), x, expert, share)
        params, opt, bias, loss, load, y, finite = step(params, opt, bias, kind)
        if n in (0, 100, 199):
            np.testing.assert_allclose(y, alone, rtol=1e-4, atol=1e-5)
        assert float(load.sum()) == T * C  # no pair is dropped
        assert bool(finite)
        losses.append(float(loss))
        worst.append(float(prices.max_violation(load)))
    assert np.isfinite(losses).all()
    assert max(worst) > 4  # skewed indeed
    assert losses[-1] < 0.2 * losses[0]
