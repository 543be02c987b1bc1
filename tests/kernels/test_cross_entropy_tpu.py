"""Mosaic TPU kernels of cross-entropy, interpreted on the CPU, against numpy float64.

Memory that nobody wrote reads as nan. On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same
tests on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import blocks, device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.cross_entropy import cross_entropy, explain, specs, tiles
from tests.kernels.test_cross_entropy import _numpy, _results
from tests.kernels.test_mosaic_tpu import chip

# Over tiles of 32 tokens and 128 entries: ends inside a tile, at its edge, and beyond it by one.
EDGES = {
    "inside": specs.Spec(T=40, D=24, V=200, padding=True, z_loss=0.02),
    "tied": specs.Spec(T=33, D=24, V=129, softcap=3.0, z_loss=0.02, padding=True, std=3.0,
                       head_layout="VD", dtype="bfloat16", head_dtype="float32"),
}
MORE = {
    "one": specs.Spec(T=1, D=24, V=129),
    "under": specs.Spec(T=31, D=24, V=127, head_layout="VD"),
    "edge": specs.Spec(T=64, D=128, V=256, softcap=3.0),
    "over": specs.Spec(T=65, D=24, V=257, std=20.0),
    "extreme": specs.Spec(T=40, D=24, V=200, std=300.0, dtype="bfloat16"),
}


def run(spec, arguments, keywords, small):
    """Losses and gradients from the kernels, in small tiles if asked."""
    T = -(-spec.T // tiles.ROWS) * tiles.ROWS
    named = [blocks.name_of("cross_entropy", "mosaic_tpu", {
        "kernel": kernel, "T": T, "D": spec.D, "V": spec.V,
        "itemsize": arguments[0].dtype.itemsize}) for kernel in ("forward", "dx", "dhead")]
    size = {"m": min(32, T), "n": min(128, spec.V)}
    with device.assume(chip()), blocks.trying({name: size for name in named if small}):
        return _results("mosaic_tpu", arguments, keywords)


def verify(spec, small=True):
    """Hold losses and gradients to the textbook's formulas."""
    arguments, keywords = spec.arguments()
    got = run(spec, arguments, keywords, small)
    assert numerics.report(got, _numpy(spec, arguments), dtype=spec.dtype) is None
    assert got["dx"].dtype == arguments[0].dtype
    assert got["dhead"].dtype == arguments[1].dtype
    return got


@pytest.mark.parametrize("name", EDGES)
def test_values_and_gradients(name):
    verify(EDGES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_edges(name):
    verify(MORE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name):
    verify(specs.PARITY[name], small=False)


@pytest.mark.slow
def test_weight_zero_means_absent():
    spec = EDGES["inside"]
    (x, head, targets, weights), keywords = spec.arguments()
    huge = jnp.where((weights == 0)[:, None], jnp.full_like(x, 1e30), x)
    got = run(spec, (huge, head, targets, weights), keywords, True)
    want = run(spec, (x, head, targets, weights), keywords, True)
    for name in ("loss", "dx", "dhead"):
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    arguments, keywords = EDGES["tied"].arguments()
    first, second = (run(EDGES["tied"], arguments, keywords, True) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_tiles_fit_in_fast_memory():
    for D, V in ((32, 80), (768, 50304), (4096, 128256), (7168, 129280)):
        for kernel in ("forward", "dx", "dhead"):
            for T in (16, 8192):
                found = tiles.choose(kernel, T, D, V, 2)
                assert tiles._bytes(kernel, found, D, 2) <= tiles.VMEM
                assert found.m % tiles.ROWS == 0
                assert found.n == V or found.n % tiles.LANES == 0


@pytest.mark.parametrize(("target", "changes", "reason"), [
    (device.Target("cpu"), {}, "needs a TPU, the device is cpu"),
    (CHIPS["v6e"].target, {"dtype": "float16"}, "x is float16"),
    (CHIPS["v5p"].target, {"T": 0}, "there are 0, 32 and 80"),
    (CHIPS["v5p"].target, {"D": 40000}, "D is 40000"),
])
def test_what_is_not_served_is_refused_with_a_reason(target, changes, reason):
    spec = dataclasses.replace(specs.Spec(), **changes)
    with device.assume(target):
        arguments, keywords = spec.arguments()
        assert explain(*specs.Spec().arguments()[0])["mosaic_tpu"] is None or not changes
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            cross_entropy(*arguments, implementation="mosaic_tpu", **keywords)
