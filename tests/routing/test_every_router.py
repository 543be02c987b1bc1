"""The laws every router keeps, and the mixture that it feeds; a new row is picked up by itself.

The oracle is a loop over tokens and their experts in float64 numpy; gradients are held against a
dense evaluation in which every expert sees every token.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import nn, routing, spec
from sparse_pretrain.routing import base, moe
from sparse_pretrain.routing.market import LOADS, SOLVERS

WIDTH, EXPERTS, SEATS = 20, 8, 2
ROWS, LENGTH = 3, 16

# Settings of a router beyond its defaults; one that is not named here is tested at those.
SETTINGS = {
    "sigmoid_bias": {
        "default": {},
        "groups": {"groups": 4, "groups_kept": 2, "scale": 2.5},
        "plain weights": {"normalise": False, "balance": 0.0},
    },
    "topk": {
        "default": {},
        "mixtral": {"aux": 0.02, "z": 0.0, "normalise": True},
        "deepseek v2": {"z": 0.0, "balance": 0.1, "scale": 4.0, "groups": 4, "groups_kept": 2},
        "sigmoid, per sequence": {"score": "sigmoid", "aux": 0.0, "z": 0.0, "balance": 0.1},
    },
    "market": {
        **{solver: {"solver": solver} for solver in SOLVERS},
        "V4": {"solver": "sign", "score": "sqrt_softplus", "scale": 1.5, "balance": 1e-2},
        "softmax": {"solver": "quantile", "score": "softmax", "normalise": False},
        "few seats": {"solver": "threshold", "seats": 3, "memory": 0.9},
        "selective": {"solver": "sinkhorn", "share": 0.5},
    },
    "expert_choice": {"default": {}, "seats": {"seats": 8, "score": "sigmoid"}},
    "hash": {"default": {}, "salted": {"salt": 7, "score": "softmax", "balance": 0.1}},
}
CASES = [
    pytest.param(kind, changes, id=f"{kind}-{name}")
    for kind in routing.TABLE
    for name, changes in SETTINGS.get(kind, {"default": {}}).items()
]
every = pytest.mark.parametrize(("kind", "changes"), CASES)
# The mixture behind a router is the same code for all; by default each router feeds it once, and
# those that drop a token or give it other weights. The other settings are the slow tests'.
FED = ("default", "sign", "few seats", "deepseek v2", "seats")
feeding = pytest.mark.parametrize(
    ("kind", "changes"),
    [
        case if case.id.partition("-")[2] in FED
        else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in CASES
    ],
)  # fmt: skip


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
    return _router_of(kind, json.dumps(changes))


@functools.cache
def _router_of(kind, changes):
    router = routing.TABLE[kind]
    config = spec.build(router.Config, json.loads(changes))
    return router, config, *made(lambda keys: router(config, WIDTH, EXPERTS, SEATS, keys))


def inputs(rng):
    """x and which of its tokens are real: the second row ends in padding, the third has a hole."""
    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    valid = np.ones((ROWS, LENGTH), bool)
    valid[1, 11:] = False
    valid[2, 4:6] = False
    return x, valid


def tokens_of(x):
    """Token ids that change where x changes much."""
    return jnp.floor(4 * x[:, :, 0]).astype(jnp.int32) + 100


@functools.cache
def ran(definition):
    """The compiled module in training, as a function of (params, prices, x, valid)."""

    def run(params, prices, x, valid):
        return definition.merge(params, prices)(x, valid, tokens_of(x), train=True)

    return jax.jit(run)


@every
def test_every_token_gets_its_experts_and_padding_none(kind, changes, rng):
    _, config, definition, params, prices = router_of(kind, changes)
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
        if config.exact:
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
    _, config, definition, params, prices = router_of(kind, changes)
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
    assert leaked != config.causal


@every
def test_held_out_text_is_never_read_ahead(kind, changes, rng):
    """Without `train` every router is causal, those too that read ahead in training."""
    _, _, definition, params, prices = router_of(kind, changes)

    @jax.jit
    def run(x):
        valid = jnp.ones((ROWS, LENGTH), bool)
        return definition.merge(params, prices)(x, valid, tokens_of(x), train=False)

    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    whole = run(x)
    for cut in (1, 7, LENGTH - 1):
        fresh = jnp.asarray(3 * rng.normal(size=(ROWS, LENGTH - cut, WIDTH)), jnp.float32)
        part = run(x.at[:, cut:].set(fresh))
        for a, b in ((whole.expert, part.expert), (whole.weight, part.weight)):
            a, b = (np.asarray(v).reshape(ROWS, LENGTH, -1)[:, :cut] for v in (a, b))
            np.testing.assert_array_equal(a, b)


@every
def test_its_weights_have_the_gradient_of_their_values(kind, changes, rng):
    """Central differences along random directions, of tokens whose experts stay the same.

    An auction ends where many a token hardly prefers its experts to others, so some always change.
    """
    _, _, definition, params, prices = router_of(kind, changes)
    x, valid = (a[2:, :7] for a in inputs(rng))  # few tokens, or one is always at an edge
    run = ran(definition)
    here = run(params, prices, x, valid)
    cotangent = jnp.asarray(rng.normal(size=here.weight.shape), jnp.float32)

    def value(params, x, held):
        got = run(params, prices, x, valid)
        counted = (got.expert < EXPERTS) & held[:, None]
        return jnp.sum(jnp.where(counted, got.weight * cotangent, 0)) + got.balance

    slope = jax.jit(jax.grad(value, (0, 1)))
    step, compared = 2e-3, 0
    for seed in range(12):
        along = randomised(jax.tree.map(jnp.zeros_like, (params, x)), 1.0, seed)
        ends = [
            jax.tree.map(lambda a, d, h=h: a + h * d, (params, x), along) for h in (step, -step)
        ]
        chosen = np.stack([np.asarray(run(p, prices, v, valid).expert) for p, v in ends])
        held = (chosen == np.asarray(here.expert)).all(axis=(0, 2))
        if not held.all() and here.balance != 0:
            continue  # a balance loss jumps with any token's choice
        up, down = (value(*end, jnp.asarray(held)) for end in ends)
        gradient = slope(params, x, jnp.asarray(held))
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, along)
        exact = sum(jax.tree.leaves(products))
        np.testing.assert_allclose((up - down) / (2 * step), exact, rtol=0.02, atol=0.02)
        compared += int(held.sum())
    assert compared >= 7


@every
def test_its_prices_move_against_the_load(kind, changes):
    router, config, _, _, prices = router_of(kind, changes)
    load = jnp.asarray([9.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 2.0])
    if not jax.tree.leaves(prices):
        assert kind in ("topk", "hash")  # balance by a loss, or not at all
        return
    proposal = jnp.asarray([3.0, -1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    moved = router.move(config, prices, load, proposal)
    assert jax.tree.structure(moved) == jax.tree.structure(prices)
    for before, after in zip(jax.tree.leaves(prices), jax.tree.leaves(moved), strict=True):
        assert before.shape == after.shape
        change = np.asarray(after - before)
        assert np.isfinite(change).all()
        if kind == "expert_choice" or getattr(config, "solver", "sign") not in LOADS:
            mixed = config.memory * before + (1 - config.memory) * proposal
            np.testing.assert_allclose(after, mixed, rtol=1e-6)
            continue
        change = -change if kind == "market" else change  # a price is minus a bias
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
