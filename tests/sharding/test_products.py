"""Linear products as a plan spreads them, in the dtypes that models compute in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from sparse_pretrain.sharding import products


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
