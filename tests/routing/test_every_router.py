"""The laws every router keeps; a new row of the table is picked up by itself."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import nn, routing, spec
from sparse_pretrain.routing import base
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
    missing = [x for x in ("KIND", "causal", "exact", "check") if not hasattr(config, x)]
    assert not missing, f"the Config of router {kind} does not state {', '.join(missing)}"
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
        assert not hasattr(router, "move")  # balance by a loss, or not at all
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
def test_a_batch_of_padding_moves_no_price(kind, changes, rng):
    """The last micro-batches of an epoch may hold none but padding: one -inf among proposals is one
    in their mean, and held-out text is routed by that."""
    _, config, definition, params, prices = router_of(kind, changes)
    x, valid = inputs(rng)
    got = ran(definition)(params, prices, x, np.zeros_like(valid))
    assert (np.asarray(got.expert) == EXPERTS).all()
    assert np.isfinite(got.balance)
    assert all(np.isfinite(told).all() for told in got.market.values())
    if "proposal" in got.market and getattr(config, "solver", "") not in LOADS:
        np.testing.assert_array_equal(got.market["proposal"], prices["price"])


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
