"""The indexer's Mosaic TPU kernels, interpreted with race detection, against loops in float64.

On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same tests on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, indexer
from kernels_pallas.chips import CHIPS
from kernels_pallas.indexer import index_kl_listed, index_select, specs, tpu_plan
from kernels_pallas.token_sparse import tpu_plan as lists_plan
from tests.kernels.test_mosaic_gpu_indexer import (
    SMALL,
    _arguments,
    check_chosen,
    check_listed,
    check_select,
    select,
)
from tests.kernels.test_mosaic_tpu import chip


def test_it_chooses_the_best():
    spec = specs.Spec(B=1, L=41, stride=3, span=3, late=True, documents=2)
    check_select(spec, chip(), "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_chooses_the_best_of_every_spec(name):
    check_select(SMALL[name], chip(), "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 470])
def test_queries_may_be_a_part_of_a_row(first):
    spec = specs.Spec(B=2, L=150, S=600, J=2, D=16, top=7)
    index, where = spec.arguments(dtype="bfloat16")
    got = select(spec, index, where, chip(), "mosaic_tpu", first=jnp.asarray(first, jnp.int32))
    check_chosen(spec, index, where, got, first)


@pytest.mark.slow
def test_several_tiles_of_queries_and_keys(monkeypatch):
    """The last keys are seen by the last tile of queries only, and the first tile skips them."""
    monkeypatch.setattr(tpu_plan, "_QUERIES", (128,))
    monkeypatch.setattr(tpu_plan, "_KEYS", (128,))
    check_select(specs.Spec(B=2, L=300, J=9, D=130, top=300), chip(), "mosaic_tpu")


def test_the_divergence_over_listed_keys_and_its_gradients():
    check_listed(specs.Spec(B=1, L=3, S=70, top=65), chip(), "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SMALL if n != "parts"])
def test_the_divergence_of_every_spec(name):
    check_listed(SMALL[name], chip(), "mosaic_tpu")


@pytest.mark.slow
def test_chunks_of_queries_and_steps_of_lists_add_up(monkeypatch):
    monkeypatch.setattr(lists_plan, "GATHERED", 2048)
    monkeypatch.setattr(lists_plan, "_TOKENS", (128,))
    check_listed(specs.Spec(B=2, L=11, S=300, top=150), chip(), "mosaic_tpu")


def test_memory_is_enough_for_every_size():
    for J in (1, 4, 33, 64, 128):
        for D in (8, 64, 72, 128):
            for itemsize in (2, 4):
                tiles = tpu_plan.choose(4096, 32768, J, D, itemsize)
                assert tpu_plan._bytes(J, D, itemsize, tiles) <= tpu_plan.VMEM


TPU = CHIPS["v5p"].target
REFUSED = {
    "gpu": (CHIPS["h200"].target, {}, "needs a TPU, the device is NVIDIA H200"),
    "dtype": (TPU, {"dtype": "float16"}, "q is float16"),
    "memory": (TPU, {"J": 1024, "D": 256}, "1024 heads of 256 take [0-9]+"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]
    chosen = jax.ShapeDtypeStruct((2, 16, 4), jnp.int32)
    mass = jax.ShapeDtypeStruct((2, 16, 4), jnp.float32)
    with device.assume(target):
        if changes:
            assert indexer.explain(*_arguments(), top=4)["mosaic_tpu"] is None
            assert indexer.listed.explain(*_arguments(), chosen, mass)["mosaic_tpu"] is None
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            index_select(*_arguments(**changes), top=4, implementation="mosaic_tpu")
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            index_kl_listed(*_arguments(**changes), chosen, mass, implementation="mosaic_tpu")


@pytest.mark.slow
def test_float32_is_not_rounded():
    spec = dataclasses.replace(specs.HOPPER["tile_heads"], L=20, J=5, D=40, top=9)
    (q, k, w), where = spec.arguments(dtype="float32")
    with device.assume(chip()):
        got = jax.jit(lambda q, k, w: index_select(
            q, k, w, top=spec.top, implementation="mosaic_tpu", **where))(q, k, w)
    want = index_select(q, k, w, top=spec.top, implementation="reference", **where)
    np.testing.assert_array_equal(got, want)
