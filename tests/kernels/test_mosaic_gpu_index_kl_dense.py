"""The divergence over all keys on Mosaic GPU, interpreted with race detection, against loops in
float64.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its generation on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, indexer, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.indexer import index_kl_dense, specs
from tests.kernels.test_indexer import MAIN_SCALE, SCALE, of_heads, visible
from tests.kernels.test_mosaic_gpu import both, recent, runs
from tests.kernels.test_mosaic_gpu_indexer import NAMES, SMALL, oracle


def check(spec, target, first=0, backend="mosaic_gpu", dtype="bfloat16"):
    """Hold the divergence and its gradients to the oracle, twice to the same bits."""
    index, where = spec.arguments(dtype=dtype)
    main = spec.main(dtype=dtype)
    rng = np.random.default_rng(5)
    lse = rng.normal(size=(spec.B, spec.L, spec.H)).astype(np.float32)
    lse[0, 0] = -1e30  # of a query whose attention saw nothing
    g = rng.normal(size=(spec.B, spec.L)).astype(np.float32)
    options = {n: x for n, x in where.items() if isinstance(x, int)}
    arrays = {n: x for n, x in where.items() if n not in options}
    if first:
        arrays["first"] = jnp.asarray(first, jnp.int32)

    @jax.jit
    def run(index, main, lse, g, arrays):
        with device.assume(target):
            def call(q, k, w):
                return index_kl_dense(q, k, w, *main, lse, main_scale=MAIN_SCALE, scale=SCALE,
                                      implementation=backend, **arrays, **options)

            loss, pull = jax.vjp(call, *index)
            return dict(zip(NAMES, (loss, *pull(g)), strict=True))

    call = functools.partial(run, index, main, jnp.asarray(lse), jnp.asarray(g), arrays)
    got, again = call(), call()
    for n in NAMES:
        assert np.asarray(got[n]).tobytes() == np.asarray(again[n]).tobytes(), n
    assert [got[n].dtype.name for n in NAMES] == ["float32"] + [dtype] * 3
    # the same over a list of all visible keys with the heads' mass, a query at a time
    chosen = np.full((spec.B, spec.L, max(spec.keys, 1)), -1)
    mass = np.ones(chosen.shape)
    for b, t in np.ndindex(spec.B, spec.L):
        keys = visible(spec, where, b, t)
        if first:
            keys = np.nonzero(np.arange(spec.keys) * spec.stride + spec.span - 1 <= t + first)[0]
        if (b, t) != (0, 0) and len(keys):
            chosen[b, t, :len(keys)] = keys
            mass[b, t, :len(keys)] = of_heads(spec, main, lse, b, t, keys)
    want = oracle(spec, index, chosen, mass, chosen >= 0, g)
    assert (want["loss"] > 0.01).any() or spec.keys < 2  # one key has all of both masses
    np.testing.assert_allclose(got.pop("loss"), want.pop("loss"), atol=2e-5)
    assert numerics.report(got, want, dtype=dtype, factor=0.4) is None


@runs
@pytest.mark.slow  # a tile of 64 keys takes half a minute whatever is in it
@both
def test_the_divergence_and_its_gradients(gpu):
    check(specs.Spec(B=2, L=13, stride=2, span=3, S=6, late=True, documents=2, H=2, K=1), gpu(2))


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", [n for n in SMALL if n != "parts"])
def test_every_spec(name, gpu):
    check(SMALL[name], gpu(3))


@runs
@pytest.mark.slow
@both
def test_more_than_a_tile_of_queries_and_keys_and_of_attentions_width(gpu):
    """Tiles of which nothing is seen, and a head's products in several steps."""
    check(specs.Spec(B=1, L=150, J=5, D=72, H=3, K=3, Dk=136), gpu(2))


@runs
@pytest.mark.slow
@both
def test_queries_may_be_a_part_of_a_row(gpu):
    check(specs.Spec(B=1, L=20, S=300, J=2, D=16), gpu(2), first=140)


REFUSED = {
    "tpu": ("v5p", {}, "the device is TPU v5"),
    "dtype": ("h200", {"dtype": "float32"}, "q is float32"),
    "attention": ("h200", {"main": "float32"}, "main_q is float32"),
    "heads": ("h100", {"J": 65}, "up to 64 heads, J is 65"),
    "blackwell": ("b200", {"J": 65}, "up to 64 heads, J is 65"),
    "width": ("h100", {"D": 136}, "widths up to 128, D is 136"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    chip, changes, reason = REFUSED[name]
    if chip == "b200" and device.jax_version() < (0, 12):
        pytest.skip("Blackwell's kernels need jax 0.12")

    def call(dtype="bfloat16", main="bfloat16", J=64, D=128, **keywords):
        shape = jax.ShapeDtypeStruct
        arrays = (shape((2, 16, J, D), dtype), shape((2, 16, D), dtype), shape((2, 16, J), dtype),
                  shape((2, 16, 4, 576), main), shape((2, 16, 1, 576), main),
                  shape((2, 16, 4), "float32"))
        return arrays, keywords

    with device.assume(CHIPS[chip].target):
        served = indexer.dense.explain(*call()[0], main_scale=1.0)
        assert (served["mosaic_gpu"] is None) == (chip != "v5p")
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            index_kl_dense(*call(**changes)[0], main_scale=1.0, implementation="mosaic_gpu")
