"""The count of executed products, against the compiler's on programs without loops."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

FILE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "executed_flops.py"
_SPEC = importlib.util.spec_from_file_location("executed_flops", FILE)
counting = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(counting)

ROWS, SIZE = 6, 8


def _compiler(call, *arguments):
    return jax.jit(call).lower(*arguments).cost_analysis()["flops"]


def _arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for s in shapes]


@jax.jit
def _product(x, w):
    return x @ w


def test_equals_the_compiler_where_nothing_loops():
    """Products alone: single, batched, inside a jitted call, and their gradients."""
    x, w, y = _arrays((ROWS, SIZE), (SIZE, SIZE), (3, SIZE, 5))

    def call(x, w, y):
        return jnp.einsum("rd,ndk->nkr", _product(_product(x, w), w.T), y)

    def gradients(x, w, y, dz):
        z, pull = jax.vjp(call, x, w, y)
        x @ w  # the result of which nothing reads
        return z, pull(dz)

    dz = jax.eval_shape(call, x, w, y)
    dz = jnp.ones(dz.shape, dz.dtype)
    forward = counting.executed_flops(call, x, w, y)
    assert forward == 2 * (2 * ROWS * SIZE**2 + 3 * ROWS * SIZE * 5)
    assert forward == _compiler(call, x, w, y)
    # the sum of w's two gradients is no product, and the compiler's count has it
    backward = counting.executed_flops(gradients, x, w, y, dz)
    assert backward == _compiler(gradients, x, w, y, dz) - SIZE**2


def test_loops_are_counted_by_their_trips_and_choices_by_what_is_taken():
    x, w = _arrays((ROWS, SIZE), (SIZE, SIZE))
    trips = jnp.asarray([2, 0, 5], jnp.int32)

    def unrolled(x, w):
        for n in (2, 0, 5):
            for _ in range(n):
                x = x @ w
            x = x @ w.T @ w if n == 0 else x
        return x

    def looped(x, w, trips):
        def row(x, n):
            x = jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)
            return jax.lax.cond(n == 0, lambda x: x @ w.T @ w, lambda x: x, x), x.sum()

        return jax.lax.scan(row, x, trips, reverse=True)

    count = counting.executed_flops(looped, x, w, trips)
    assert count == _compiler(unrolled, x, w) == 9 * 2 * ROWS * SIZE**2
    assert count != _compiler(looped, x, w, trips)


def test_values_go_round_a_loop_as_in_the_program():
    """Trips that depend on what was computed: the walk must compute the same."""
    x, w = _arrays((ROWS, SIZE), (SIZE, SIZE))

    def call(x, w):
        def step(carry):
            return carry[0] @ w, carry[1] + 1

        return jax.lax.while_loop(lambda c: jnp.abs(c[0]).max() > 0.01, step, (x, 0))

    trips = int(jax.jit(call)(x, w)[1])
    assert trips > 1
    assert counting.executed_flops(call, x, w) == trips * 2 * ROWS * SIZE**2
