"""The mixture that a router feeds, for every router: values, gradients and loads.

The oracle is a loop over tokens and their experts in float64 numpy; gradients are held against a
dense evaluation in which every expert sees every token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import routing, spec
from sparse_pretrain.routing import base, moe
from tests.routing.test_every_router import (
    CASES,
    EXPERTS,
    LENGTH,
    ROWS,
    SEATS,
    WIDTH,
    inputs,
    made,
    tokens_of,
)

# The mixture behind a router is the same code for all; by default each router feeds it once, and
# one that drops tokens. The other settings are the slow tests'.
FED = ("default", "sign", "few seats")
feeding = pytest.mark.parametrize(
    ("kind", "changes"),
    [
        case if case.id.partition("-")[2] in FED
        else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in CASES
    ],
)  # fmt: skip


def mixture(kind, changes, shared):
    section = spec.build(routing.TABLE[kind].Config, changes)
    config = moe.Config(experts=EXPERTS, top_k=SEATS, hidden=12, shared=shared, router=section)
    return config, *made(lambda keys: moe.MoE(config, WIDTH, keys))


def swiglu64(x, gate, up, down):
    """One expert on one token, written out."""
    g, u = x @ gate, x @ up
    return (g / (1 + np.exp(-g)) * u) @ down


def looped(params, x, assignment):
    """The layer, token by token, in float64."""
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64).reshape(-1, WIDTH)
    y = np.zeros_like(x)
    for t in range(x.shape[0]):
        for expert, weight in zip(assignment.expert[t], assignment.weight[t], strict=True):
            if expert < EXPERTS:
                own = [wide[name][expert] for name in ("w_gate", "w_up", "w_down")]
                y[t] += float(weight) * swiglu64(x[t], *own)
        if "shared" in wide:
            y[t] += swiglu64(x[t], *[wide["shared"][n] for n in ("w_gate", "w_up", "w_down")])
    return y.reshape(ROWS, LENGTH, WIDTH)


def dense(params, x, assignment):
    """The layer with every expert on every token, float64, differentiable."""
    f64 = jnp.float64
    flat = x.reshape(-1, WIDTH).astype(f64)
    hit = assignment.expert[:, :, None] == jnp.arange(EXPERTS, dtype=jnp.int32)[None, None, :]
    share = jnp.sum(hit.astype(f64) * assignment.weight[:, :, None].astype(f64), axis=1)

    def mlp(own):
        gate, up, down = (own[n].astype(f64) for n in ("w_gate", "w_up", "w_down"))
        return jnp.matmul(jax.nn.silu(jnp.matmul(flat, gate)) * jnp.matmul(flat, up), down)

    y = jnp.einsum("te,etd->td", share, mlp(params))
    if "shared" in params:
        y = y + mlp(params["shared"])
    return y.reshape(x.shape)


def close(got, want, what=""):
    """Equal to float32 rounding, relative to the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5, err_msg=what)


@jax.jit
def dense_gradients(params, x, weight, expert, cotangent):
    """Of the experts, the tokens and the weights; one program for every router."""

    def loss(params, x, weight):
        y = dense(params, x, base.Assignment(expert, weight, jnp.zeros(())))
        return jnp.sum(y * cotangent.astype(y.dtype))

    return jax.grad(loss, (0, 1, 2))(params, x, weight)


@feeding
def test_the_mixture_equals_a_dense_evaluation(kind, changes, rng):
    _, definition, params, prices = mixture(kind, changes, shared=2)
    x, valid = inputs(rng)
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def layer(params, x):
        module = definition.merge(params, prices)
        y, told = module(x, jnp.asarray(valid), tokens_of(x), train=True)
        loss = jnp.sum((y * cotangent).astype(jnp.float32)) + told.balance
        return loss, (y, told.load, told.balance)

    grads = dict(argnums=(0, 1), has_aux=True)
    (_, (y, load, balance)), ours = jax.jit(jax.value_and_grad(layer, **grads))(params, x)

    @jax.jit
    def routed(params, x, d_weight):
        """The assignment, and what a gradient of its weights and its balance come to."""

        def run(params, x):
            got = definition.merge(params, prices).router(
                x, jnp.asarray(valid), tokens_of(x), train=True
            )
            return jnp.sum(got.weight * d_weight) + got.balance, got

        return jax.value_and_grad(run, **grads)(params, x)

    # the experts in float64, then the router by the chain rule: its own gradient is held above
    shape = jax.eval_shape(routed, params, x, jnp.zeros((1, 1)))[0][1].weight
    (_, assignment), _ = routed(params, x, jnp.zeros(shape.shape, shape.dtype))
    own = {name: p for name, p in params.items() if name != "router"}
    with jax.enable_x64(True):
        *dense_part, d_weight = dense_gradients(
            own, x, assignment.weight, assignment.expert, cotangent
        )
    _, (routers_part, d_x) = routed(params, x, d_weight)
    wanted = {
        name: jax.tree.map(np.add, dense_part[0].get(name, jax.tree.map(np.zeros_like, g)), g)
        for name, g in routers_part.items()
    }
    close(y, looped(params, x, jax.tree.map(np.asarray, assignment)))
    close(ours, (wanted, dense_part[1] + d_x))
    np.testing.assert_array_equal(load, base.count_load(assignment.expert, EXPERTS))
    np.testing.assert_allclose(balance, assignment.balance, rtol=1e-6)
    assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(ours))


def by_hand(rng):
    """Experts of every token's two seats, for loads that no router would make."""
    n = np.arange(ROWS * LENGTH)
    other = rng.permuted(np.tile([0, 1, 2, 4, 6, 7], (n.size, 1)), axis=1)[:, 0]
    none = np.full(n.size, EXPERTS)
    return {
        "one takes all and one nothing": np.stack([0 * n + 3, other], axis=1),
        "two take all": np.stack([0 * n + 7, 0 * n], axis=1),
        "even": np.stack([n % 8, (n + 3) % 8], axis=1),
        "half dropped": np.stack([n % 8, none], axis=1),
        "all dropped": np.stack([none, none], axis=1),
    }


def test_any_load_equals_the_dense_evaluation(rng):
    """Values, and gradients of the tokens, the experts and the weights, without any router."""
    _, definition, params, prices = mixture(next(iter(routing.TABLE)), {}, shared=0)
    router = params.pop("router")
    x, valid = inputs(rng)
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def layer(params, x, weight, expert):
        module = definition.merge({**params, "router": router}, prices)
        module.router = lambda *_, train: base.Assignment(expert, weight, jnp.zeros(()))
        y, _ = module(x, jnp.asarray(valid))
        return jnp.sum(y * cotangent), y

    def oracle(params, x, weight, expert):
        y = dense(params, x, base.Assignment(expert, weight, jnp.zeros(())))
        return jnp.sum(y * cotangent.astype(y.dtype)), y

    grads = dict(argnums=(0, 1, 2), has_aux=True)
    layer, oracle = (jax.jit(jax.value_and_grad(f, **grads)) for f in (layer, oracle))
    for load, expert in by_hand(rng).items():
        expert = expert.astype(np.int32)
        weight = rng.uniform(0.1, 1.0, expert.shape).astype(np.float32)
        (_, y), ours = layer(params, x, weight, expert)
        with jax.enable_x64(True):
            _, wanted = oracle(params, x, weight, expert)
        close(y, looped(params, x, base.Assignment(expert, weight, None)), load)
        close(ours, wanted, load)
        idle = set(range(EXPERTS)) - set(expert.reshape(-1).tolist())
        for name in ("w_gate", "w_up", "w_down"):
            size = np.abs(ours[0][name]).max(axis=(1, 2))
            assert {e for e in range(EXPERTS) if size[e] == 0.0} == idle, load
