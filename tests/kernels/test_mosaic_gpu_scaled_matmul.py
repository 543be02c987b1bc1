"""scaled_matmul's Mosaic GPU kernels, interpreted with race detection, against E4M3 in numpy.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its generation on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.grouped_matmul import aligned, contiguous
from kernels_pallas.grouped_matmul.layout import row_expert
from kernels_pallas.scaled_matmul import explain, gpu_plan, scaled_matmul, specs, tiles
from tests.kernels.test_mosaic_gpu import blackwell, both, hopper, recent, runs
from tests.kernels.test_scaled_matmul import check


@runs
@pytest.mark.parametrize(("name", "dtype", "gpu"), [
    ("experts", "float32", hopper), ("outliers", "bfloat16", hopper),
    ("outliers", "bfloat16", blackwell)])
def test_values_and_gradients(name, dtype, gpu):
    with device.assume(gpu(2)):
        check(name, "mosaic_gpu", dtype)


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, dtype, gpu):
    with device.assume(gpu(3)):
        check(name, "mosaic_gpu", dtype)


@runs
@pytest.mark.slow
@both
def test_float32_results_are_those_of_the_loop_and_the_same_twice(gpu):
    """E4M3 products are exact: only sums of 128 of them may differ from XLA's loop over tiles."""
    (x, w, layout), keywords = specs.PARITY["tile_edges"].arguments()
    used = jnp.asarray(np.asarray(row_expert(layout)[1])[:, None], jnp.float32)

    def run(backend):
        call = functools.partial(scaled_matmul, layout=layout, implementation=backend, **keywords)
        return jax.jit(jax.value_and_grad(lambda x, w: ((used * call(x, w)) ** 2).sum(), (0, 1)))

    with device.assume(gpu(2)):
        kernel = run("mosaic_gpu")
        first, second = kernel(x, w), kernel(x, w)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    same = run("xla")(x, w)
    assert numerics.report(first[0], same[0]) is None
    # the cotangent 2 y is rounded to 8 bits anew, where a last bit of y may decide
    assert numerics.report(first[1], same[1], factor=100) is None


def test_used_rows_are_in_one_tile_of_their_group(rng):
    for experts, pairs, block in ((1, 300, 128), (5, 700, 128), (16, 500, 8)):
        lay_out = jax.jit(functools.partial(aligned, pairs=pairs, block=block))
        cut = jax.jit(tiles.row_tiles)
        for alpha in (100, 0.1):
            sizes = rng.multinomial(pairs, rng.dirichlet(np.full(experts, alpha)))
            layout = lay_out(jnp.asarray(sizes, jnp.int32))
            row, mine, groups = (np.asarray(a) for a in cut(layout))
            assert sorted(groups[:, 0]) == list(range(experts))
            assert (np.diff(sizes[groups[:, 0]]) <= 0).all()
            held = np.zeros(layout.rows, int)
            for expert, first, count in groups:
                assert count == -(-sizes[expert] // 128)
                own = row[first:first + count][mine[first:first + count]]
                start = int(layout.starts[expert])
                np.testing.assert_array_equal(own, np.arange(start, start + sizes[expert]))
                held[own] += 1
            assert held.sum() == mine.sum() == pairs  # tiles of no group hold nothing
            assert row.max() < layout.rows


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vectors", [1, 2])
def test_stages_fit_in_shared_memory(itemsize, vectors):
    for n in (128, 256):
        wide = gpu_plan.wide_stages(itemsize, n)
        assert wide >= 3
        assert wide * 128 * (128 + n) + 2 * 128 * 64 * itemsize <= 227 * 1024 - 2048
    stages = gpu_plan.stages(itemsize, vectors)
    taken = stages * (2 * 128 * 128 + vectors * 512) + 2 * 64 * 64 * itemsize
    assert stages >= 4
    assert taken <= 227 * 1024 - 2048


def _arguments(dtype="bfloat16", D=200, block=128):
    shape = jax.ShapeDtypeStruct
    whole = shape((4,), jnp.int32)
    layout = contiguous(whole, whole, 4 * block, block)
    return shape((4 * block, D), dtype), shape((4, D, 100), "float32"), layout


REFUSED = {
    "cpu": (device.Target("cpu"), {}, "needs an NVIDIA GPU, the device is cpu"),
    "ampere": (device.Target("gpu", "A100", (8, 0)), {}, r"needs Hopper \(9.0\) or .* is \(8, 0\)"),
    "half": (CHIPS["h200"].target, {"dtype": "float16"}, "x is float16"),
    "empty": (CHIPS["h100"].target, {"D": 0}, r"numbers to multiply, x has shape \(512, 0\)"),
    "starts": (CHIPS["h100"].target, {"block": 12}, "multiples of 8 rows.* blocks of 12"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]
    with device.assume(target):
        assert explain(*_arguments())["mosaic_gpu"] is None or not changes
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            scaled_matmul(*_arguments(**changes), implementation="mosaic_gpu")
