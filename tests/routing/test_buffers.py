"""What the compiled mixture holds: no array E or k times its rows, one copy of the gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.routing import experts
from sparse_pretrain.sharding import ops


def compiled(E, T, C, D, F):
    """The gradient of a mixture, float32 masters and bfloat16 rows, as a compiled program."""

    def value(weights, x, share, expert):
        y = experts.run(weights, x, expert, share)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    weights = experts.Weights(array(E, D, F), array(E, D, F), array(E, F, D))
    rest = array(T, D, dtype=jnp.bfloat16), array(T, C), array(T, C, dtype=jnp.int32)
    return jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(weights, *rest).compile()


def sizes(text):
    """Elements of every array of numbers named in a compiled program."""
    found = re.findall(r"\b(?:bf16|f32|s32|u32)\[([0-9,]+)\]", text)
    return {math.prod(int(n) for n in dims.split(",")) for dims in found}


@pytest.mark.parametrize(
    ("E", "T", "C"),
    [pytest.param(32, 512, 2, marks=pytest.mark.slow),
     pytest.param(16, 256, 4, marks=pytest.mark.slow),
     (64, 512, 8)],
)  # fmt: skip
def test_no_array_is_larger_than_the_rows_or_the_experts(E, T, C):
    D, F = 48, 40
    rows, _ = ops.group_rows(T * C, E)
    largest = max(sizes(compiled(E, T, C, D, F).as_text()))
    assert largest <= max(rows * max(D, F), E * D * F)
    assert rows <= 1.5 * T * C or rows <= T * C + E * 8  # few rows an expert: blocks of 8


def test_temporaries_hold_no_second_gradient():
    E, D, F = 64, 256, 192  # the experts outweigh the 64 rows, and what a loop copies, by far
    memory = compiled(E, 32, 2, D, F).memory_analysis()
    gradient = 4 * 3 * E * D * F
    assert memory.output_size_in_bytes >= gradient
    # the experts in bfloat16 are half a gradient; nothing else of their size
    assert memory.temp_size_in_bytes <= 0.75 * gradient, memory.temp_size_in_bytes / gradient
    assert np.isfinite(memory.temp_size_in_bytes)
