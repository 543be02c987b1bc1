"""scaled_matmul and its gradients against an emulation of E4M3 in numpy float64, tile by tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from kernels_pallas.grouped_matmul import aligned
from kernels_pallas.grouped_matmul.layout import row_expert
from kernels_pallas.scaled_matmul import TILE, dequantize, op, quantize, scaled_matmul, specs

BACKENDS = [b.name for b in op.backends if not b.name.startswith("mosaic")]


def e4m3(x):
    """Round to four exponent and three mantissa bits, ties to even, subnormals from 2^-6 down."""
    magnitude = np.maximum(np.abs(x), 2.0**-6)
    step = 2.0 ** (np.floor(np.log2(magnitude)) - 3)
    return np.clip(np.round(x / step) * step, -448, 448)


def rounded(x, height, width, power_of_two):
    """What x becomes in 8 bits, by explicit tiles; scales and quotients are float32 by contract."""
    out = np.zeros(x.shape)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            tile = x[i:i + height, j:j + width].astype(np.float32)
            scale = np.abs(tile).max() * np.float32(1 / 448)
            if power_of_two and scale:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            if scale:
                out[i:i + height, j:j + width] = e4m3((tile / scale).astype(np.float64)) * scale
    return out


def emulated(x, w, dy, power_of_two):
    """The three products of one matrix."""
    p = power_of_two
    w8 = rounded(w, TILE, TILE, p)
    return (rounded(x, 1, TILE, p) @ w8, rounded(dy, 1, TILE, p) @ w8.T,
            rounded(x, TILE, 1, p).T @ rounded(dy, TILE, 1, p))


def oracle(x, w, layout, dy, power_of_two):
    """Dense, or a loop over experts and their own rows."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    if layout is None:
        return emulated(x, w, dy, power_of_two)
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for e, (start, size) in enumerate(zip(np.asarray(layout.starts), np.asarray(layout.sizes),
                                          strict=True)):
        mine = slice(start, start + size)
        y[mine], dx[mine], dw[e] = emulated(x[mine], w[e], dy[mine], power_of_two)
    return y, dx, dw


def check(name, backend, dtype):
    (x, w, layout), keywords = specs.PARITY[name].arguments(dtype=dtype)
    used = np.ones((x.shape[0], 1), bool)
    if layout is not None:
        used = np.asarray(row_expert(layout)[1])[:, None]
    dy = numerics.normal((x.shape[0], w.shape[-1]), x.dtype, seed=9) * jnp.asarray(used, x.dtype)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(
            lambda x, w: scaled_matmul(x, w, layout, implementation=backend, **keywords), x, w)
        return y, *pull(dy)

    y, dx, dw = run(x, w, dy)
    got = {"y": jnp.where(used, y, jnp.zeros_like(y)), "dx": dx, "dw": dw}
    want = dict(zip(got, oracle(x, w, layout, dy, keywords["power_of_two"]), strict=True))
    assert numerics.report(got, want, dtype=dtype) is None
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)


@pytest.mark.parametrize(("name", "backend", "dtype"), [
    ("outliers", "xla", "float32"), ("edges", "xla", "bfloat16"), ("experts", "xla", "float32"),
    ("experts", "reference", "float32"), ("power_of_two", "reference", "float32")])
def test_values_and_gradients(name, backend, dtype):
    check(name, backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, backend, dtype):
    check(name, backend, dtype)


def test_numbers_are_rounded_as_e4m3_has_them(rng):
    x = np.concatenate([np.linspace(-448, 448, 4001), rng.normal(size=4000) * 2.0**-7,
                        [2.0**-10, 3 * 2.0**-10, 17, 17.0625, 19]]).astype(np.float32)
    x = np.append(x, 448).reshape(1, -1)
    q, scale = quantize(jnp.asarray(x), (1, x.size), power_of_two=True)
    assert scale.item() == 1
    np.testing.assert_array_equal(np.asarray(q, np.float64), e4m3(x.astype(np.float64)))


def test_scales():
    x = jnp.zeros((256, 128)).at[3, 5].set(448.0).at[200, 7].set(-450.0).at[130].set(1e-40)
    q, scale = quantize(x, (128, 128))
    np.testing.assert_allclose(scale[:, 0], [1, 450 / 448], rtol=1e-6)
    np.testing.assert_allclose(dequantize(q, scale, (128, 128))[200, 7], -450, rtol=1e-6)
    _, scale = quantize(x, (128, 128), power_of_two=True)
    assert scale[:, 0].tolist() == [1, 2]
    # zeros and numbers too small to have a scale of their own stay finite
    q, scale = quantize(x, (1, 128))
    assert scale[0, 0] == 1
    assert np.isfinite(np.asarray(dequantize(q, scale, (1, 128)))).all()


def test_a_power_of_two_adds_no_error_of_its_own(rng):
    exact = jnp.asarray(e4m3(rng.normal(size=(4, 300)) * 40), jnp.float32)
    q, scale = quantize(exact, (1, TILE), power_of_two=True)
    normal = np.abs(exact) > 2.0**-3
    np.testing.assert_array_equal(np.asarray(dequantize(q, scale, (1, TILE)))[normal],
                                  np.asarray(exact)[normal])


@pytest.mark.parametrize(("x", "w", "grouped", "says"), [
    ((4, 8), (9, 3), False, r"x \(4, 8\) does not fit w \(9, 3\)"),
    ((4, 8), (2, 8, 3), False, "does not fit"),
    ((4, 8), (8, 3), True, "does not fit w .* of experts"),
    ((4, 8), (2, 8, 3), True, r"do not fit a layout of \d+ rows and 2 experts"),
])
def test_mistakes_are_named(x, w, grouped, says):
    layout = aligned(jnp.asarray([1, 2], jnp.int32), pairs=3) if grouped else None
    with pytest.raises(ValueError, match=says):
        scaled_matmul(jnp.zeros(x), jnp.zeros(w), layout)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="w is int32, expected floats"):
        scaled_matmul(jnp.zeros((4, 8)), jnp.zeros((8, 3), jnp.int32))
