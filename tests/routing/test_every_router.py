"""The laws every router keeps, and the mixture that it feeds; a new row is picked up by itself.

The oracle is a loop over tokens and their experts in float64 numpy; gradients are held against a
dense evaluation in which every expert sees every token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import nn, routing, spec
from sparse_pretrain.routing import base, moe

WIDTH, EXPERTS, SEATS = 20, 8, 2
ROWS, LENGTH = 3, 16

# Settings of a router beyond its defaults; one that is not named here is tested at those.
SETTINGS = {
    "sigmoid_bias": {
        "default": {},
        "groups": {"groups": 4, "groups_kept": 2, "scale": 2.5},
        "plain weights": {"normalise": False, "balance": 0.0},
    },
}
CASES = [
    pytest.param(kind, changes, id=f"{kind}-{name}")
    for kind in routing.TABLE
    for name, changes in SETTINGS.get(kind, {"default": {}}).items()
]
every = pytest.mark.parametrize(("kind", "changes"), CASES)


def randomised(tree, std, seed):
    """Each array with normal noise added: zero prices and equal rows hide mistakes."""
    leaves, treedef = jax.tree.flatten(tree)
    draw = np.random.default_rng(seed)
    noisy = [x + jnp.asarray(std * draw.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def made(build):
    """(definition, params, prices) of a module, no array at its initial value."""
    definition = nn.define(build)
    params, prices = definition.init(jax.random.key(0))
    return definition, randomised(params, 0.1, 1), randomised(prices, 0.1, 2)


def router_of(kind, changes):
    router = routing.TABLE[kind]
    config = spec.build(router.Config, changes)
    return router, config, *made(lambda keys: router(config, WIDTH, EXPERTS, SEATS, keys))


def inputs(rng):
    """x and which of its tokens are real: the second row ends in padding, the third has a hole."""
    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    valid = np.ones((ROWS, LENGTH), bool)
    valid[1, 11:] = False
    valid[2, 4:6] = False
    return x, valid


def ran(definition):
    """The compiled module, as a function of (params, prices, x, valid)."""
    return jax.jit(lambda params, prices, x, valid: definition.merge(params, prices)(x, valid))


@every
def test_every_token_gets_its_experts_and_padding_none(kind, changes, rng):
    router, _, definition, params, prices = router_of(kind, changes)
    x, valid = inputs(rng)
    got = ran(definition)(params, prices, x, valid)
    expert, weight, flat = np.asarray(got.expert), np.asarray(got.weight), valid.reshape(-1)
    assert expert.shape == weight.shape
    assert expert.shape[0] == flat.size
    assert ((expert >= 0) & (expert <= EXPERTS)).all()
    assert (expert[~flat] == EXPERTS).all()
    for row in expert[flat]:
        taken = row[row < EXPERTS]
        assert len(set(taken)) == len(taken)
        if router.causal:  # the token chooses, and nothing is dropped
            assert len(taken) == SEATS
    assert np.isfinite(weight).all()
    assert (weight[expert < EXPERTS] > 0).all()
    assert got.balance.shape == ()
    assert np.isfinite(got.balance)
    load = base.count_load(got.expert, EXPERTS)
    np.testing.assert_array_equal(load, np.bincount(expert[flat].reshape(-1), minlength=8)[:8])


@every
def test_padding_is_not_read(kind, changes, rng):
    _, _, definition, params, prices = router_of(kind, changes)
    x, valid = inputs(rng)
    other = jnp.where(valid[:, :, None], x, jnp.asarray(rng.normal(size=x.shape), jnp.float32))
    run = ran(definition)
    a, b = (run(params, prices, v, valid) for v in (x, other))
    flat = valid.reshape(-1)
    np.testing.assert_array_equal(a.expert, b.expert)
    np.testing.assert_array_equal(a.weight[flat], b.weight[flat])
    np.testing.assert_array_equal(a.balance, b.balance)


@every
def test_a_later_token_moves_no_earlier_one(kind, changes, rng):
    """A router that reads the whole batch says `causal = False`, and must then be seen to leak."""
    router, _, definition, params, prices = router_of(kind, changes)
    run, everywhere, leaked = ran(definition), np.ones((ROWS, LENGTH), bool), False
    for _ in range(8):
        x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
        cut = int(rng.integers(1, LENGTH - 1))
        fresh = 3 * rng.normal(size=(ROWS, LENGTH - cut, WIDTH))
        later = x.at[:, cut:].set(jnp.asarray(fresh, jnp.float32))
        before, after = (run(params, prices, v, everywhere).expert for v in (x, later))
        shape = (ROWS, LENGTH, -1)
        before, after = np.asarray(before).reshape(shape), np.asarray(after).reshape(shape)
        leaked |= bool((before[:, :cut] != after[:, :cut]).any())
        assert (before[:, cut:] != after[:, cut:]).any()
    assert leaked != router.causal


@every
def test_its_weights_have_the_gradient_of_their_values(kind, changes, rng):
    """Central differences along random directions, where the choice of experts stays the same."""
    _, _, definition, params, prices = router_of(kind, changes)
    x, valid = (a[2:, :7] for a in inputs(rng))  # few tokens, or one is always at an edge
    run = ran(definition)
    shape = run(params, prices, x, valid).weight.shape
    cotangent = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def value(params, x):
        got = run(params, prices, x, valid)
        return jnp.sum(jnp.where(got.expert < EXPERTS, got.weight * cotangent, 0)) + got.balance

    gradient = jax.jit(jax.grad(value, (0, 1)))(params, x)
    step, compared = 2e-3, 0
    for seed in range(12):
        along = randomised(jax.tree.map(jnp.zeros_like, (params, x)), 1.0, seed)
        ends = [
            jax.tree.map(lambda a, d, h=h: a + h * d, (params, x), along) for h in (step, -step)
        ]
        chosen = [np.asarray(run(p, prices, v, valid).expert) for p, v in ends]
        if (chosen[0] != chosen[1]).any():  # across the edge the value jumps
            continue
        numeric = (value(*ends[0]) - value(*ends[1])) / (2 * step)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, along)
        exact = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(numeric, exact, rtol=0.02, atol=0.02)
        compared += 1
    assert compared


@every
def test_its_prices_move_against_the_load(kind, changes):
    router, config, _, _, prices = router_of(kind, changes)
    load = jnp.asarray([9.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 2.0])
    moved = router.move(config, prices, load)
    assert jax.tree.structure(moved) == jax.tree.structure(prices)
    for before, after in zip(jax.tree.leaves(prices), jax.tree.leaves(moved), strict=True):
        assert before.shape == after.shape
        change = np.asarray(after - before)
        assert np.isfinite(change).all()
        assert change[0] < change[2] < change[1]  # busiest down, idlest up
        assert abs(change.mean()) < 1e-6  # or it drifts for ever


@every
def test_it_fits_the_house(kind, changes):
    router, config, definition, params, _ = router_of(kind, changes)
    assert config.KIND == kind
    assert spec.build(router.Config, config.to_dict()) == config
    dims = jax.tree.leaves(definition.dims, is_leaf=lambda d: isinstance(d, tuple))
    for names, array in zip(dims, jax.tree.leaves(params), strict=True):
        assert len(names) == array.ndim
    with pytest.raises(ValueError, match="top_k"):
        config.check(EXPERTS, EXPERTS + 1)


# --- the mixture behind it -----------------------------------------------------------------------


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


@every
def test_the_mixture_equals_a_dense_evaluation(kind, changes, rng):
    _, definition, params, prices = mixture(kind, changes, shared=2)
    x, valid = inputs(rng)
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def layer(params, x):
        y, load, balance = definition.merge(params, prices)(x, jnp.asarray(valid))
        return jnp.sum((y * cotangent).astype(jnp.float32)) + balance, (y, load, balance)

    grads = dict(argnums=(0, 1), has_aux=True)
    (_, (y, load, balance)), ours = jax.jit(jax.value_and_grad(layer, **grads))(params, x)

    def routed(params, x):
        return definition.merge(params, prices).router(x, jnp.asarray(valid))

    # the experts in float64, then the router by the chain rule: its own gradient is held above
    assignment = jax.jit(routed)(params, x)
    with jax.enable_x64(True):

        def oracle(params, x, weight):
            y = dense(params, x, assignment._replace(weight=weight))
            return jnp.sum(y * cotangent.astype(y.dtype))

        *wanted, d_weight = jax.jit(jax.grad(oracle, (0, 1, 2)))(params, x, assignment.weight)

    def chained(params, x):
        got = routed(params, x)
        return jnp.sum(got.weight * d_weight) + got.balance

    wanted = jax.tree.map(jnp.add, tuple(wanted), jax.jit(jax.grad(chained, (0, 1)))(params, x))
    close(y, looped(params, x, jax.tree.map(np.asarray, assignment)))
    close(ours, wanted)
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
        module.router = lambda x, valid: base.Assignment(expert, weight, jnp.zeros(()))
        y, _, _ = module(x, jnp.asarray(valid))
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
