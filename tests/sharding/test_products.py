"""Linear products as a plan spreads them, in the dtypes that models compute in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.op import prefer
from sparse_pretrain.routing import experts
from sparse_pretrain.sharding import products
from tests.kernels.test_mosaic_gpu import hopper, recent, runs


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("contract", [1, 2])
def test_spread_products_are_those_of_float64(contract, dtype, rng):
    """Weights stay float32, as a model's are, and so does their gradient."""
    inner = (3, 4)[:contract]
    x, w, dy = (rng.standard_normal(s) for s in ((2, 5, *inner), (*inner, 6, 7), (2, 5, 6, 7)))
    x, dy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, dy))
    y, back = jax.vjp(lambda x, w: products._spread(contract, x, w),
                      jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32))  # fmt: skip
    dx, dw = back(jnp.asarray(dy, dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    wide = np.asarray(jnp.asarray(w, jnp.float32).astype(dtype), np.float64)
    wanted = {
        "y": (y, np.tensordot(x, wide, contract)),
        "dx": (dx, np.tensordot(dy, wide, ((2, 3), (contract, contract + 1)))),
        "dw": (dw, np.tensordot(x, dy, ((0, 1), (0, 1)))),
    }
    for name, (got, want) in wanted.items():
        assert numerics.error(np.asarray(got, np.float64), want) < numerics.tolerance(dtype), name


def _experts(shapes=jax.ShapeDtypeStruct):
    """Three experts' weights, tokens, whom they go to and how much of each."""
    weights = experts.Weights(*(shapes((3, 64, 64), jnp.bfloat16) for _ in range(3)))
    return (weights, shapes((24, 64), jnp.bfloat16), shapes((24, 2), jnp.int32),
            shapes((24, 2), jnp.bfloat16))  # fmt: skip


@recent
@pytest.mark.parametrize(("preferred", "kernels"), [((), 0), (("mosaic_gpu",), 2)])
def test_experts_first_half_is_one_kernel_where_that_is_preferred(preferred, kernels):
    with device.assume(CHIPS["h200"].target), prefer(*preferred):
        text = str(jax.make_jaxpr(lambda *a: experts.run(*a))(*_experts()))
    assert len(re.findall(r"\b(?:mpmd_map|core_map)\[", text)) == kernels


@runs
@pytest.mark.slow
def test_experts_with_one_kernel_give_what_they_give_without(rng):
    def numbers(shape, dtype):
        if dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, 4, shape), dtype)  # expert 3 is none
        return jnp.asarray(rng.normal(size=shape) * 0.3, dtype)

    arguments = _experts(numbers)
    dy = numbers((24, 64), jnp.bfloat16)

    def run(weights, x, expert, share):
        y, pull = jax.vjp(lambda w, x: experts.run(w, x, expert, share), weights, x)
        return y, pull(dy)

    want = jax.jit(run)(*arguments)
    with device.assume(hopper(2)), prefer("mosaic_gpu"):
        got = jax.jit(lambda *a: run(*a))(*arguments)
    assert numerics.report(got, want, dtype="bfloat16") is None
