"""block_sparse's Mosaic TPU kernels, interpreted, against loops in float64.

Memory that nobody wrote reads as nan. On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same
tests on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.block_sparse import block_sparse, explain, plan, specs
from kernels_pallas.chips import CHIPS
from tests.kernels import test_mosaic_gpu_block_sparse as gpu
from tests.kernels.test_mosaic_gpu_block_sparse import (
    EDGES,
    NAMES,
    SMALL,
    _arguments,
    check,
    edges,
    oracle,
)
from tests.kernels.test_mosaic_tpu import chip


def compiled(spec):
    """What Hopper's tests compute, from these kernels."""
    return gpu.compiled(spec, target=chip(), backend="mosaic_tpu")


def test_tile_edges_repeated_and_absent_choices():
    got = check(EDGES, compiled(EDGES), edges())
    assert not np.asarray(got["dq"], np.float32)[0, 0].any()  # a row that sees nothing


@pytest.mark.slow
def test_float32_is_not_rounded():
    spec = dataclasses.replace(specs.HOPPER["tile_shared"], L=20, dtype="float32")
    arguments = spec.arguments()[0]
    rows = (spec.B, spec.L, spec.H)
    cotangents = numerics.uniform_like(
        (jax.ShapeDtypeStruct((*rows, spec.Dv), jnp.float32),
         jax.ShapeDtypeStruct(rows, jnp.float32)), seed=7)
    got, want = compiled(spec)(*arguments, *cotangents), oracle(spec, arguments, cotangents)
    for name in NAMES:
        seen = np.where(want[name] < -1e29, 0, want[name])
        held = np.where(want[name] < -1e29, 0, np.asarray(got[name]))
        assert numerics.error(held, seen, floor=1.0) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_small_spec(name):
    spec = specs.HOPPER[name]
    check(spec, compiled(spec), spec.arguments()[0])


@pytest.mark.slow
def test_blocks_as_high_as_tiles_and_chunks_of_queries(monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 512)
    spec = dataclasses.replace(specs.HOPPER["tile_any"], L=300, S=768, H=2, block=plan.TPU_X)
    check(spec, compiled(spec), spec.arguments()[0])


TPU = CHIPS["v5p"].target
REFUSED = {
    "gpu": (CHIPS["h200"].target, {}, {}, "needs a TPU, the device is NVIDIA H200"),
    "dtype": (TPU, {"dtype": "float16"}, {}, "q is float16"),
    "Dk": (TPU, {"Dk": 80}, {}, "Dk is 80"),
    "Dv": (TPU, {"Dv": 32}, {}, "Dv is 32"),
    "block": (TPU, {}, {"block": 24}, "multiples of 16, block is 24"),
    "heads": (TPU, {"H": 512, "G": 1}, {}, "at most 256 heads .* there are 512"),
    "memory": (TPU, {}, {"block": 8192}, "a block of 8192 takes [0-9]+"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, others, reason = REFUSED[name]
    keywords = {"block": 64, "scale": 1.0}
    with device.assume(target):
        assert explain(*_arguments(), **keywords)["mosaic_tpu"] is None or not (changes or others)
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            block_sparse(*_arguments(**changes), implementation="mosaic_tpu",
                         **keywords | others)
