"""The language model as a whole: causality, packing, scan, remat, decoding, parameter counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import nn, shapes
from sparse_pretrain.model import decode, layers, lm
from sparse_pretrain.optim import groups
from sparse_pretrain.planning import flops
from sparse_pretrain.training import loss
from tests.model.conftest import DENSE, EXPERTS, packed, small

_all_made = {}


def _made(config):
    """(definition, params, prices) of a configuration, made once."""
    if repr(config) not in _all_made:
        _all_made[repr(config)] = _make(config)
    return _all_made[repr(config)]


def _make(config):
    definition = lm.define(config)
    params, prices = jax.jit(definition.init)(jax.random.key(0))
    # zero biases hide bugs
    leaves, tree = jax.tree.flatten(prices)
    keys = jax.random.split(jax.random.key(9), max(len(leaves), 1))
    drawn = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=False)]
    return definition, params, jax.tree.unflatten(tree, drawn)


@functools.cache
def _compiled(definition):
    @jax.jit
    def run(params, prices, batch):
        model = definition.merge(params, prices)
        hidden, aux = model(batch)
        head, layout = model.head_weight()
        how = "bld,dv->blv" if layout == "DV" else "bld,vd->blv"
        return jnp.einsum(how, hidden, head), aux.load

    return run


def _logits(definition, params, prices, batch):
    return _compiled(definition)(params, prices, batch)[0]


def _loss(definition, prices, batch):
    def value(params):
        weight = jnp.sum(jnp.asarray(batch.weights))
        return loss.loss_sums(definition, params, prices, batch, weight, 1)[0]

    return jax.jit(value)


@pytest.mark.parametrize(
    "changes",
    [{"scan": False, "remat": "dots"}, pytest.param({"remat": "full"}, marks=pytest.mark.slow)],
    ids=["unrolled, dots", "full"],
)
def test_scan_unroll_and_remat_agree(changes, batch):
    results = []
    for each in ({}, changes):
        definition, params, prices = _made(small(prefix=(), pattern=("mixed",), **each))
        results.append(jax.jit(jax.value_and_grad(_loss(definition, prices, batch)))(params))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    for a, b in zip(*(jax.tree.leaves(grads) for _, grads in results), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_later_token_changes_nothing_before_it(batch):
    definition, params, prices = _made(small())
    before = _logits(definition, params, prices, batch)
    tokens = np.array(batch.tokens)
    tokens[:, 15:] = (tokens[:, 15:] + 7) % 61
    after = _logits(definition, params, prices, batch._replace(tokens=tokens))
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert np.abs(np.asarray(before[:, 15:] - after[:, 15:])).max() > 1e-3


def test_packed_documents_equal_separate_rows(batch):
    definition, params, prices = _made(small())
    together = np.asarray(_logits(definition, params, prices, batch))
    row = 1
    for segment in (1, 2):
        where = np.flatnonzero(batch.segments[row] == segment)
        # alone at the start of a row, in a batch of the same shape that is padding otherwise
        alone = shapes.Batch(*(np.zeros_like(np.asarray(f)) for f in batch.fields))
        for held, field in zip(alone.fields, batch.fields, strict=True):
            held[0, : where.size] = np.asarray(field)[row, where]
        alone.segments[0, : where.size] = 1
        ours = _logits(definition, params, prices, alone)
        np.testing.assert_allclose(together[row, where], ours[0, : where.size], atol=2e-5)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_decoding_equals_the_parallel_forward(tied, rng):
    config = small(tied=tied)
    definition, params, prices = _made(config)
    length = 12
    ids = rng.integers(0, 61, (2, length)).astype(np.int32)
    ones = np.ones_like(ids)
    positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    batch = shapes.Batch(ids, ids, ones, positions, ones.astype(np.float32), ones, ones * 0)
    parallel = _logits(definition, params, prices, batch)
    model = definition.merge(params, prices)
    cache = decode.init_cache(model, 2, length)
    one = jax.jit(lambda token, cache, t: decode.decode(model, token, cache, t))
    for t in range(length):
        logits, cache = one(jnp.asarray(ids[:, t]), cache, t)
        np.testing.assert_allclose(logits, parallel[:, t], atol=2e-5)


def _convolved(**changes):
    config = small(repeats=1, pattern=("moe",), **changes)
    blocks = {k: dataclasses.replace(b, conv=3) for k, b in config.blocks.items()}
    return dataclasses.replace(config, blocks=blocks)


def test_a_short_convolution_is_its_sum_over_the_documents_last_tokens(batch, rng):
    convolution = layers.ShortConv(4, 6, nn.Keys(jax.random.key(0)))
    x = rng.normal(size=(*batch.segments.shape, 6)).astype(np.float32)
    got = convolution(jnp.asarray(x), jnp.asarray(batch.segments))
    taps = np.asarray(nn.read(convolution.taps), np.float64)
    want = x.astype(np.float64)
    for b, row in enumerate(batch.segments):
        for t in range(len(row)):
            for back in range(4):
                if t >= back and row[t - back] == row[t]:
                    want[b, t] += taps[back] * x[b, t - back]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_documents_do_not_mix_in_a_convolution_and_decoding_equals_it(batch, rng):
    definition, params, prices = _made(_convolved())
    plain = lm.define(small(repeats=1, pattern=("moe",)))
    together = np.asarray(_logits(definition, params, prices, batch))
    other = {k: {n: v for n, v in p.items() if n != "conv"} if isinstance(p, dict) else p
             for k, p in params.items()}
    assert np.abs(together - _logits(plain, other, prices, batch)).max() > 1e-3
    tokens = np.where(batch.segments == 1, (batch.tokens + 7) % 61, batch.tokens)
    changed = np.asarray(_logits(definition, params, prices, batch._replace(tokens=tokens)))
    rest = batch.segments > 1
    assert rest.any()
    np.testing.assert_array_equal(together[rest], changed[rest])

    ids = rng.integers(0, 61, (2, 6)).astype(np.int32)
    ones = np.ones_like(ids)
    at = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    alone = shapes.Batch(ids, ids, ones, at, ones.astype(np.float32), ones, ones * 0)
    parallel = _logits(definition, params, prices, alone)
    model = definition.merge(params, prices)
    cache = decode.init_cache(model, 2, 6)
    one = jax.jit(lambda token, cache, t: decode.decode(model, token, cache, t))
    for t in range(6):
        logits, cache = one(jnp.asarray(ids[:, t]), cache, t)
        np.testing.assert_allclose(logits, parallel[:, t], atol=2e-5)


def test_a_convolutions_taps_follow_adam_and_its_work_is_counted():
    config, plain = _convolved(), small(repeats=1, pattern=("moe",))
    dims = lm.define(config).dims
    assert dims["stack_0"]["conv"]["taps"] == ("N", "W", "D")
    assert groups.group(("N", "W", "D")) == groups.group(("W", "D")) == "vector"
    more = lm.work_per_token(config, 24).linear - lm.work_per_token(plain, 24).linear
    assert more == 2 * 2 * 3 * 32  # layers, multiply-add, taps, width
    with pytest.raises(ValueError, match="conv: must be 0 to 64, got -1"):
        dataclasses.replace(config.blocks["moe"], conv=-1)


def test_softcap_and_z_loss_enter_the_loss(batch):
    one = dict(prefix=("dense",), pattern=("dense",), repeats=1)
    plain, params, prices = _made(small(**one))
    base = _loss(plain, prices, batch)(params)
    for changes in ({"softcap": 0.5}, {"z_loss": 0.1}):
        definition = lm.define(small(**one, **changes))
        assert abs(float(_loss(definition, prices, batch)(params) - base)) > 1e-4


def test_counts_are_the_models_own():
    config = small()
    definition, params, _ = _made(config)
    counts = flops.parameters(config)
    assert counts.total == sum(x.size for x in jax.tree.leaves(params))
    moe_layers = 4
    idle = moe_layers * 6 * 3 * 32 * EXPERTS.hidden
    assert counts.active == counts.total - idle - 61 * 32
    assert counts.active_with_embedding == counts.total - idle
    assert set(definition.dims) == set(params)


def test_wrong_sections_are_refused():
    with pytest.raises(ValueError, match="block 'mo' is not in blocks"):
        small(pattern=("mo",))
    with pytest.raises(ValueError, match="top_k: 9 exceeds experts 8"):
        dataclasses.replace(EXPERTS, top_k=9)
    with pytest.raises(ValueError, match="hidden: must be positive"):
        dataclasses.replace(DENSE, hidden=0)


def test_padding_moves_no_load_and_no_loss(rng):
    batch = packed(rng)
    definition, params, prices = _made(small())
    changed = np.array(batch.tokens)
    changed[-1, -5:] = 3
    other = batch._replace(tokens=changed)
    for which in (batch, other):
        for load in _compiled(definition)(params, prices, which)[1].values():
            np.testing.assert_array_equal(load.sum(-1), 2 * (batch.segments > 0).sum())
    value = jax.jit(
        lambda batch: loss.loss_sums(
            definition, params, prices, batch, jnp.sum(batch.weights), 1
        )[0]
    )
    np.testing.assert_array_equal(value(batch), value(other))
