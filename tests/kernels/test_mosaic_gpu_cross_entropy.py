"""Mosaic GPU kernels of cross-entropy, interpreted with race detection, against numpy float64.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its generation on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.cross_entropy import cross_entropy, explain, gpu_plan, specs
from tests.kernels.test_cross_entropy import _numpy, _results
from tests.kernels.test_mosaic_gpu import both, recent, runs

# Over tiles of 128 tokens, 64 of the width and 256 entries: every feature, ends inside a tile.
ALL = specs.Spec(T=150, D=72, V=259, z_loss=0.02, softcap=5.0, padding=True, std=3.0,
                 head_layout="VD", dtype="bfloat16", head_dtype="float32")
MORE = {
    "all": ALL,
    "untied": dataclasses.replace(ALL, head_layout="DV"),
    "edge": specs.Spec(T=128, D=64, V=512, dtype="bfloat16"),
    "over": specs.Spec(T=129, D=65, V=513, std=20.0, dtype="bfloat16"),
    "small": specs.Spec(T=1, D=3, V=2, dtype="bfloat16"),
    "extreme": specs.Spec(T=40, D=24, V=300, std=300.0, dtype="bfloat16"),
}


def exact(spec, **changes):
    """Arguments of which the head is what the kernels multiply."""
    (x, head, targets, weights), keywords = spec.arguments(**changes)
    head = head.astype(jnp.bfloat16).astype(head.dtype)
    return (x, head, targets, weights), keywords


def run(gpu, arguments, keywords):
    with device.assume(gpu):
        return _results("mosaic_gpu", arguments, keywords)


def verify(spec, gpu, **changes):
    """Hold losses and gradients to the textbook's formulas."""
    arguments, keywords = exact(spec, **changes)
    got = run(gpu, arguments, keywords)
    want = _numpy(spec, arguments)
    assert (got["dx"].dtype, got["dhead"].dtype) == (arguments[0].dtype, arguments[1].dtype)
    for name in ("loss", "nll", "loss alone", "nll alone"):
        assert numerics.report(got[name], want[name], dtype="float32", floor=1.0) is None, name
    for name in ("dx", "dhead"):
        assert numerics.report(got[name], want[name], dtype="bfloat16", factor=0.4) is None, name
    return got


@runs
@both
def test_values_and_gradients(gpu):
    verify(ALL, gpu(2))


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", MORE)
def test_more_edges(name, gpu):
    verify(MORE[name], gpu(3))


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, gpu):
    verify(specs.PARITY[name], gpu(2), dtype="bfloat16")


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("layout", ["VD", "DV"])
@pytest.mark.parametrize(("T", "V", "chunk"), [(300, 259, 128), (150, 600, 256)])
def test_gradients_in_parts(gpu, monkeypatch, T, V, chunk, layout):
    """Of the tokens where there are more of them, else of the vocabulary; the last part shorter."""
    monkeypatch.setattr(gpu_plan, "AT_ONCE", 1)
    monkeypatch.setattr(gpu_plan, "LEAST", 128)
    plan = gpu_plan.Plan(gpu_plan.whole(T, 128), 128, V, 0, None, layout)
    assert (plan.by_entries, plan.chunk) == (T < V, chunk)
    verify(dataclasses.replace(ALL, T=T, V=V, head_layout=layout), gpu(2))


@runs
@pytest.mark.slow
@both
def test_weight_zero_means_absent_and_two_runs_give_the_same_bits(gpu):
    (x, head, targets, weights), keywords = exact(ALL)
    huge = jnp.where((weights == 0)[:, None], jnp.full_like(x, 1e30), x)
    got = run(gpu(2), (huge, head, targets, weights), keywords)
    want, again = (run(gpu(2), (x, head, targets, weights), keywords) for _ in range(2))
    for name in ("loss", "dx", "dhead"):
        np.testing.assert_array_equal(got[name], want[name])
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_parts_are_whole_tiles_and_take_no_more_than_a_gradient():
    for T in (128, 8192, 131072):
        for V in (80, 50304, 129280):
            plan = gpu_plan.Plan(T, 4096, V, 0.0, None, "DV")
            tile, length = (plan.n, V) if plan.by_entries else (gpu_plan.TILE_M, T)
            assert plan.chunk % tile == 0
            assert 128 <= plan.chunk < length + tile
            # no more memory than the other gradient in float32, but for a tile
            other = min(T, plan.columns)
            assert 2 * (plan.chunk - tile) * other <= 4 * plan.D * other
            assert plan.stages >= 4
            taken = plan.stages * 2 * 64 * (128 + plan.n) + 2 * 64 * 64 * 2
            assert taken <= 227 * 1024 - 2048


@runs
def test_a_vocabulary_of_any_size_is_lowered_for_a_chip():
    """Mosaic GPU copies from whole rows of 128 bytes, for which interpretation does not ask."""
    assert gpu_plan.Plan(2048, 768, 50257, 0.0, None, "DV").columns == 50304
    with device.assume(CHIPS["h200"].target):
        def loss(x, head, targets, weights):
            return cross_entropy(x, head, targets, weights, implementation="mosaic_gpu")[0]

        shapes = (((130, 64), jnp.bfloat16), ((64, 77), jnp.bfloat16), ((130,), jnp.int32),
                  ((130,), jnp.float32))
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(
            *(jax.ShapeDtypeStruct(*each) for each in shapes))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


REFUSED = {
    "cpu": (device.Target("cpu"), {}, "needs an NVIDIA GPU, the device is cpu"),
    "ampere": (device.Target("gpu", "A100", (8, 0)), {}, r"needs Hopper \(9.0\) or .* is \(8, 0\)"),
    "float32": (CHIPS["h200"].target, {"dtype": "float32"}, "x is float32"),
    "head": (CHIPS["h200"].target, {"head_dtype": "float16"}, "head is float16"),
    "empty": (CHIPS["h100"].target, {"T": 0}, r"x is \(0, 32\)"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]
    spec = specs.Spec(dtype="bfloat16")
    with device.assume(target):
        assert explain(*spec.arguments()[0])["mosaic_gpu"] is None or not changes
        arguments, keywords = dataclasses.replace(spec, **changes).arguments()
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            cross_entropy(*arguments, implementation="mosaic_gpu", **keywords)
