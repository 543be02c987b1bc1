"""Products in 8 bits: which ones are, which never, and how far the loss moves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.scaled_matmul import scaled_matmul
from sparse_pretrain.attention import full
from sparse_pretrain.model import block, ffn, lm, precision
from sparse_pretrain.routing import moe
from sparse_pretrain.sharding import ops
from sparse_pretrain.training import loss
from tests.model.conftest import packed

FP8 = precision.Config(products="fp8")


def _model(**changes):
    one = block.Config(
        attention=full.Config(heads=2, head_dim=16), ffn=moe.Config(experts=4, hidden=32)
    )
    sizes = dict(width=32, vocab=61, repeats=1, pattern=("b",), blocks={"b": one}, scan=False)
    return lm.Config(**(sizes | changes))


def _value(config, batch):
    definition = lm.define(config)

    def value(params, prices):
        weight = jnp.sum(jnp.asarray(batch.weights))
        return loss.loss_sums(definition, params, prices, batch, weight, 1)[0]

    return definition, value


def _narrow_products(jaxpr):
    """How many products take 8-bit numbers, those inside calls and branches included."""
    return len(re.findall(r"f8_e4m3fn\[[^\]]*\] = convert_element_type", str(jaxpr)))


def test_layers_and_experts_round_and_nothing_else_does(rng):
    """Seven weights and their inputs: q, k, v, o, the shared experts' three, the routed ones'."""
    batch = packed(rng, rows=2, length=16)
    counted = {}
    for name, changes in (("model", {}), ("fp8", {"precision": FP8})):
        definition, value = _value(_model(**changes), batch)
        jaxpr = jax.make_jaxpr(value)(definition.shapes, definition.price_shapes)
        counted[name] = _narrow_products(jaxpr)
    assert counted["model"] == 0
    assert counted["fp8"] >= 2 * 7


def test_a_product_is_the_kernels_and_float32_stays(rng):
    x = jnp.asarray(rng.normal(size=(3, 5, 32)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(32, 2, 16)), jnp.float32)
    plain = ops.linear(x, w)
    with ops.eight_bits(True, power_of_two=True):
        rounded, exact = ops.linear(x, w), ops.linear(x.astype(jnp.float32), w)
    want = scaled_matmul(x, w.reshape(32, 32), power_of_two=True).reshape(3, 5, 2, 16)
    np.testing.assert_array_equal(rounded, want)
    assert (rounded != plain).any()
    np.testing.assert_array_equal(exact, ops.linear(x.astype(jnp.float32), w))
    np.testing.assert_array_equal(ops.linear(x, w), plain)


def test_the_loss_and_its_gradients_are_near_those_of_the_models_dtype(rng):
    batch = packed(rng, rows=2, length=16)
    one = block.Config(attention=full.Config(heads=2, head_dim=16), ffn=ffn.DenseConfig(hidden=32))
    found = []
    for changes in ({}, {"precision": FP8}):
        definition, value = _value(_model(blocks={"b": one}, **changes), batch)
        params, prices = definition.init(jax.random.key(0)) if not found else found[0][2]
        total, grads = jax.jit(jax.value_and_grad(value))(params, prices)
        found.append((total, grads, (params, prices)))
    (a, da, _), (b, db, _) = found
    assert a != b
    assert float(b) == pytest.approx(float(a), rel=0.0025)  # DeepSeek-V3's bound on the loss
    for one, other in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        norm = np.linalg.norm(one)
        assert np.linalg.norm(one - other) < 0.3 * norm + 1e-6


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"^products: 'fp4' is not one of model, fp8"):
        precision.Config(products="fp4")
    with pytest.raises(ValueError, match=r"^precision.products: fp8 needs dtype bfloat16, got fl"):
        _model(dtype="float32", precision=FP8)
