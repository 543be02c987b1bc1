"""The published models that ship: parameters and FLOPs as printed elsewhere, and the tiny ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import config, optim, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.planning import flops
from sparse_pretrain.training import state, step
from tests.model.conftest import drawn

# total and active parameters, router biases among them; None where nothing is published.
# V3: the released weights' metadata without the multi-token module; its active parameters with one
# embedding and with both. OLMoE: its model card. The others: their weights' metadata.
PUBLISHED = {
    "deepseek/v3": (671_026_419_200, (36_625_618_432, 37_552_297_472)),
    "deepseek/v2": (235_741_434_880, ()),
    "deepseek/v2_lite": (15_706_484_224, ()),
    "olmoe_1b_7b": (6_919_161_856, (None, 1_282_017_280)),
    "mixtral_8x7b": (46_702_792_704, ()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    model = config.resolve(name).model
    counts = flops.parameters(model)
    biases = sum(math.prod(x.shape) for x in jax.tree.leaves(lm.define(model).price_shapes))
    total, active = PUBLISHED[name]
    assert counts.total + biases == total
    for ours, theirs in zip(counts[1:], active, strict=False):
        assert theirs in (None, ours + biases)


@pytest.mark.parametrize(("name", "giga"), [("deepseek/v2", 155), ("deepseek/v3", 250)])
def test_flops_per_token_are_the_published_ones(name, giga):
    """2505.09343, table 2, at 4,096 tokens."""
    ours = flops.train_flops_per_token(config.resolve(name).model, 4096).model
    assert ours == pytest.approx(giga * 1e9, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_keeps_the_structure(name):
    whole, tiny = (config.resolve(name + arg) for arg in ("", ":tiny"))
    assert set(tiny.model.blocks) == set(whole.model.blocks)
    for block, section in whole.model.blocks.items():
        ours = tiny.model.blocks[block]
        assert (ours.attention.KIND, ours.ffn.KIND) == (section.attention.KIND, section.ffn.KIND)
        if section.ffn.KIND == "moe":
            assert ours.ffn.shared == section.ffn.shared
            assert ours.ffn.router.KIND == section.ffn.router.KIND
            assert (ours.ffn.router.groups > 1) == (section.ffn.router.groups > 1)


# a step of MLA and experts compiles for 20 s of one core
CHEAP = ("olmoe_1b_7b",)
TINY = [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]


@pytest.mark.parametrize("name", TINY)
def test_tiny_trains(name):
    tiny = config.resolve(name + ":tiny")
    model = dataclasses.replace(tiny.model, vocab=64)
    definition = lm.define(model)
    table = optim.TABLE[tiny.optim.KIND]
    tx = table.build(tiny.optim, definition.dims, lambda _: jnp.float32(0.01))
    run = step.make_train_step(definition, model, tx, schedule=lambda _: jnp.float32(0.01))
    params, prices = (drawn(x) for x in (definition.shapes, definition.price_shapes))
    opt = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params))
    now = state.TrainState(jnp.int32(0), params, opt, prices, {}, {}, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 32)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.tile(np.arange(32, dtype=np.int32), (2, 1))
    weights = ones.astype(np.float32)
    batch = shapes.Batch(tokens, np.roll(tokens, -1, 1), ones, positions, weights, ones, 0 * ones)
    losses = []
    for _ in range(2):
        now, told = run(now, batch)
        losses.append(float(told["loss"]))
    assert losses[1] < losses[0] < 1.5 * math.log(64)
    seats = [(s.ffn.top_k, s.ffn.experts) for s in model.layer_list if s.ffn.KIND == "moe"]
    loads = np.concatenate([np.atleast_2d(x) for x in told["load"].values()])
    assert loads.shape == (len(seats), seats[0][1])
    assert (loads.sum(1) == tokens.size * seats[0][0]).all()


def test_v3_with_its_module_ahead_is_the_released_weights():
    """2412.19437: 14B more, of which embedding and head are the main model's and not held twice."""
    whole, ahead = (flops.parameters(config.resolve(f"deepseek/v3{a}").model) for a in ("", ":mtp"))
    stored = 684_531_386_000 - 41_540_496 - 671_026_419_200  # the release, block scales aside
    shared, bias = 2 * 129280 * 7168, 256
    assert ahead.total - whole.total == ahead.mtp == stored - shared - bias
    assert ahead.active == whole.active


def test_another_argument_is_refused():
    with pytest.raises(ValueError, match=r"'tiny', 'mtp' or none, got 'x'"):
        config.resolve("deepseek/v3:x")
