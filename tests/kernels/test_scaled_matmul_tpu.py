"""scaled_matmul's Mosaic TPU kernels, interpreted with race detection, against E4M3 in numpy.

Memory that nobody wrote reads as nan. On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same
tests on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import blocks, device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.grouped_matmul import aligned, contiguous, visits
from kernels_pallas.grouped_matmul.layout import row_expert
from kernels_pallas.scaled_matmul import explain, quantize, scaled_matmul, specs, tiles
from tests.kernels.test_mosaic_tpu import chip
from tests.kernels.test_scaled_matmul import check, oracle

PAIRS, D, F = 300, 130, 140  # both widths of two tiles
LOADS = {
    "edges": [127, 0, 129, 1],
    "one takes all": [0, 0, 300, 0],
    "aligned": [128, 128, 0, 0],
    "nothing": [0, 0, 0, 0],
}


def run(x, w, dy, layout, **keywords):
    """Values and gradients from the kernels."""
    with device.assume(chip()):
        y, pull = jax.vjp(lambda x, w: scaled_matmul(
            x, w, layout, implementation="mosaic_tpu", **keywords), x, w)
        return y, *pull(dy)


def small_tiles(layout):
    """Requests of all three products answered with small tiles, two of 128 rows for the weights."""
    found = {}
    whole_D, whole_F, experts = tiles.whole(D), tiles.whole(F), layout.sizes.shape[0]
    by_group = (layout.rows // tiles.TILE + experts) * tiles.TILE
    for product, rows, contracted, columns, m in (
            ("scaled", layout.rows, whole_D, whole_F, 128),
            ("scaled_transposed", layout.rows, whole_F, whole_D, 128),
            ("scaled_weights", by_group, whole_D, whole_F, 256)):
        found[blocks.name_of("scaled_matmul", "mosaic_tpu", {
            "product": product, "rows": rows, "experts": experts, "contracted": contracted,
            "columns": columns, "itemsize": 4})] = visits.Tiles(m, 128, 128)._asdict()
    return found


@pytest.fixture(scope="module")
def compiled():
    """The three products in small tiles, compiled once for all loads of 300 pairs."""
    @jax.jit
    def products(x, w, dy, sizes):
        layout = aligned(sizes, pairs=PAIRS)
        small = small_tiles(layout)
        with blocks.recorded() as asked, blocks.trying(small):
            made = run(x, w, dy, layout)
        assert set(asked) == set(small)
        return made

    return products


def arrays(load, rng):
    """A layout, which rows are used, x with numbers in every row, w, and a cotangent."""
    layout = aligned(jnp.asarray(LOADS[load], jnp.int32), pairs=PAIRS)
    used = np.asarray(row_expert(layout)[1])[:, None]
    x, w, dy = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (
        (layout.rows, D), (len(LOADS[load]), D, F), (layout.rows, F)))
    return layout, used, x, w, jnp.where(used, dy, 0)


@pytest.mark.parametrize("load", [
    load if load == "edges" else pytest.param(load, marks=pytest.mark.slow) for load in LOADS])
def test_values_and_gradients(load, compiled, rng):
    layout, used, x, w, dy = arrays(load, rng)
    got = compiled(x, w, dy, layout.sizes)
    want = oracle(x, w, layout, dy, False)
    assert numerics.report(got, want, factor=1 if used.any() else 0) is None
    assert not np.asarray(got[0])[~used[:, 0]].any()


@pytest.mark.slow
def test_what_is_not_finite_stays_its_experts(compiled, rng):
    layout, _, x, w, dy = arrays("edges", rng)
    first, second = (int(n) for n in layout.starts[2] + np.array([5, 128]))
    _, _, clean = compiled(x, w, dy, layout.sizes)
    bad = x.at[first, 3].set(jnp.nan).at[second, 129].set(jnp.inf)
    y, _, dw = (np.asarray(a) for a in compiled(bad, w, dy, layout.sizes))
    assert not np.isfinite(y[[first, second]]).any()
    assert np.isfinite(np.delete(y, [first, second], 0)).all()
    assert not np.isfinite(dw[2, [3, 129]]).any()
    assert np.isfinite(np.delete(dw[2], [3, 129], 0)).all()
    np.testing.assert_array_equal(dw[[0, 1, 3]], np.asarray(clean)[[0, 1, 3]])


@pytest.mark.slow
def test_two_runs_give_the_same_bits(compiled, rng):
    layout, _, x, w, dy = arrays("edges", rng)
    runs = [compiled(x, w, dy, layout.sizes) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, dtype):
    with device.assume(chip()):
        check(name, "mosaic_tpu", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 127, 128, 129, 513])
def test_lengths_around_a_tiles(T, rng):
    x, w, dy = (jnp.asarray(rng.normal(size=size), "bfloat16")
                for size in ((T, 129), (129, 257), (T, 257)))
    got = jax.jit(functools.partial(run, layout=None))(x, w, dy)
    assert numerics.report(got, oracle(x, w, None, dy, False)) is None


@pytest.mark.slow
def test_a_steps_sums_go_on_in_the_next(rng):
    """Three steps of two tiles, and rows enough for a visit of several tiles by each of both."""
    sizes = (300, 0, 500)
    layout = aligned(jnp.asarray(sizes, jnp.int32), pairs=sum(sizes))
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32)
            for size in ((layout.rows, 768), (3, 768, 128)))
    name = blocks.name_of("scaled_matmul", "mosaic_tpu", {
        "product": "scaled", "rows": layout.rows, "experts": 3, "contracted": 768, "columns": 128,
        "itemsize": 4})
    dy = jnp.zeros((layout.rows, 128))
    with blocks.trying({name: visits.Tiles(256, 256, 128)._asdict()}):
        y, *_ = jax.jit(run)(x, w, dy, layout)
    assert numerics.report(y, oracle(x, w, layout, dy, False)[0]) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_of_rows_go_through_to_their_results(dtype, rng):
    """A power of two changes no digit, however large, nor what other rows have."""
    sizes = 2.0 ** rng.choice([-90, -60, 0, 60, 90], (40, 1))
    x, w, dy = (jnp.asarray(rng.normal(size=size), dtype)
                for size in ((40, 200), (200, 150), (40, 150)))
    multiply = jax.jit(functools.partial(run, layout=None))
    y, dx, _ = multiply(x, w, dy)
    large_y, large_dx, dw = multiply(*((a.astype("float32") * b).astype(dtype) for a, b in (
        (x, sizes), (w, 2.0**-20), (dy, sizes))))
    for one, other in ((y, large_y), (dx, large_dx)):
        want = np.asarray(one, np.float64) * sizes * 2.0**-20
        np.testing.assert_array_equal(np.asarray(other, np.float64), want)
    assert np.isfinite(np.asarray(dw, np.float64)).mean() < 1  # 2^180 is beyond float32


@pytest.mark.slow
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("shape", "size"), [
    (tiles.ROW, (1030, 2176)), (tiles.ROW, (8, 128)), (tiles.BLOCK, (2, 640, 2176))])
def test_rounding_is_that_of_tiles(shape, size, power_of_two, rng):
    from kernels_pallas.scaled_matmul import mosaic_tpu

    x = np.asarray(rng.normal(size=size), np.float32)
    x[..., 3, :] *= 1e-30
    x[..., 5, :] = 0
    x[..., 7, 40] = 1e30
    with device.assume(chip()):
        got = jax.jit(lambda x: mosaic_tpu._quantize(x, shape, power_of_two))(x)
    want = jax.jit(lambda x: quantize(x, shape, power_of_two))(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_tiles_fit_in_fast_memory():
    layout = contiguous(*(jnp.zeros(8, jnp.int32),) * 2, 32768, 128)
    for wide, high in ((128, 256), (7168, 4096), (2048, 7168), (18432, 7168), (640, 40960)):
        for itemsize in (2, 4):
            for product in ("scaled", "scaled_transposed", "scaled_weights"):
                found = visits.choose(layout, product, wide, high, itemsize)
                assert all(n % 128 == 0 for n in found)
                if product == "scaled_weights":
                    taken = visits._gradient_bytes(product, found, itemsize)
                else:
                    taken = visits._bytes(found, itemsize, visits.HELD[product])
                    assert wide % found.k == 0
                m, k, n = found
                # operands of a byte twice, and a result in float32
                assert m * k + k * n < taken <= visits.VMEM


def _arguments(dtype="bfloat16", w_dtype="float32", D=200):
    shape = jax.ShapeDtypeStruct
    whole = shape((4,), jnp.int32)
    layout = contiguous(whole, whole, 512, 128)
    return shape((512, D), dtype), shape((4, D, 100), w_dtype), layout


@pytest.mark.parametrize(("target", "changes", "reason"), [
    (device.Target("cpu"), {}, "needs a TPU, the device is cpu"),
    (CHIPS["h200"].target, {}, "the device is NVIDIA H200"),
    (device.Target("tpu", "TPU v4"), {}, "those of a TPU v5 or newer, this is a TPU v4"),
    (CHIPS["tpu7x"].target, {"dtype": "float16"}, "x is float16"),
    (CHIPS["v6e"].target, {"w_dtype": "float16"}, "w is float16"),
    (CHIPS["v5p"].target, {"D": 0}, r"numbers to multiply, x has shape \(512, 0\)"),
])
def test_what_is_not_served_is_refused_with_a_reason(target, changes, reason):
    with device.assume(target):
        assert explain(*_arguments())["mosaic_tpu"] is None or not changes
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            scaled_matmul(*_arguments(**changes), implementation="mosaic_tpu")
