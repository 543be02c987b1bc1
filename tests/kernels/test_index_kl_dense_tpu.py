"""The divergence over all keys on Mosaic TPU, interpreted with race detection, against loops in
float64.

On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same tests on it.
"""

import jax
import pytest

from kernels_pallas import device, indexer
from kernels_pallas.chips import CHIPS
from kernels_pallas.indexer import index_kl_dense, specs, tpu_plan
from tests.kernels.test_mosaic_gpu_index_kl_dense import check
from tests.kernels.test_mosaic_gpu_indexer import SMALL
from tests.kernels.test_mosaic_tpu import chip


def test_the_divergence_and_its_gradients():
    spec = specs.Spec(B=2, L=13, stride=2, span=3, S=6, late=True, documents=2, H=2, K=1)
    check(spec, chip(), backend="mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SMALL if n != "parts"])
def test_every_spec(name):
    check(SMALL[name], chip(), backend="mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2, 4, 12])
def test_several_tiles_and_groups_of_heads(heads, monkeypatch):
    """Tiles of which nothing is seen; of 12 heads that share 3 key heads so many a step."""
    monkeypatch.setattr(tpu_plan, "_QUERIES", (128,))
    monkeypatch.setattr(tpu_plan, "_KEYS", (128,))
    every = tpu_plan._mass_options
    monkeypatch.setattr(tpu_plan, "_mass_options", lambda *a: [
        t for t in every(*a) if t.heads == heads])
    check(specs.Spec(B=2, L=300, J=5, D=72, H=12, K=3, Dk=136), chip(), backend="mosaic_tpu")


@pytest.mark.slow
def test_queries_may_be_a_part_of_a_row(monkeypatch):
    monkeypatch.setattr(tpu_plan, "_KEYS", (128,))
    check(specs.Spec(B=1, L=20, S=300, J=2, D=16), chip(), first=140, backend="mosaic_tpu")


@pytest.mark.slow
def test_float32_is_not_rounded():
    check(specs.Spec(B=1, L=30, documents=2), chip(), backend="mosaic_tpu", dtype="float32")


def test_tiles_fit_in_fast_memory():
    for J, D in ((1, 8), (4, 32), (64, 128), (128, 128)):
        for kernel in ("query_slopes", "key_slopes"):
            assert tpu_plan.choose_slopes(kernel, 4096, 32768, J, D, 2)
    for H, K, D in ((1, 1, 8), (8, 8, 64), (12, 3, 128), (128, 1, 576)):
        tiles = tpu_plan.choose_mass(4096, 32768, H, K, D, 2)
        assert H % tiles.heads == 0
        # a step's heads are of one key head, or all those of whole ones
        assert H // K % tiles.heads == 0 or tiles.heads % (H // K) == 0


REFUSED = {
    "gpu": ("h200", {}, "the device is NVIDIA H200"),
    "dtype": ("v5p", {"dtype": "float16"}, "q is float16"),
    "attention": ("v6e", {"main": "float16"}, "main_q is float16"),
    "heads": ("v5p", {"J": 400}, "400 of 128 do not"),
    "width": ("tpu7x", {"Dk": 1 << 16}, "65536 wide is not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]

    def call(dtype="bfloat16", main="bfloat16", J=64, Dk=576):
        shape = jax.ShapeDtypeStruct
        return (shape((2, 16, J, 128), dtype), shape((2, 16, 128), dtype), shape((2, 16, J), dtype),
                shape((2, 16, 4, Dk), main), shape((2, 16, 1, Dk), main),
                shape((2, 16, 4), "float32"))

    with device.assume(CHIPS[target].target):
        served = indexer.dense.explain(*call(), main_scale=1.0)["mosaic_tpu"]
        assert (served is None) == (target != "h200")
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            index_kl_dense(*call(**changes), main_scale=1.0, implementation="mosaic_tpu")
