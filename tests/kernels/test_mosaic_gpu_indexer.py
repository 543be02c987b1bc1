"""The indexer's Mosaic GPU kernels, interpreted with race detection, against loops in float64.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its
generation on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, indexer, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.indexer import gpu_plan, index_kl_listed, index_select, specs
from tests.kernels.test_indexer import SCALE, divergence, score, visible
from tests.kernels.test_mosaic_gpu import blackwell, both, hopper, recent, runs

SMALL = specs.PARITY | {n: s for n, s in specs.HOPPER.items() if n.startswith("tile_")}
NAMES = ("loss", "dq", "dk", "dw")


def select(spec, index, where, target, backend="mosaic_gpu", **changes):
    @jax.jit
    def run(index, arrays):
        with device.assume(target):
            return index_select(*index, top=spec.top, scale=SCALE, implementation=backend,
                                **arrays, **options)

    where = where | changes
    options = {n: x for n, x in where.items() if isinstance(x, int)}
    return np.asarray(run(index, {n: x for n, x in where.items() if n not in options}))


def check_chosen(spec, index, where, got, first=0):
    """Each query has its best visible keys, best first."""
    assert (got.shape, got.dtype) == ((spec.B, spec.L, spec.top), np.int32)
    some = 0
    for b, t in np.ndindex(spec.B, spec.L):
        ends = np.arange(spec.keys) * spec.stride + spec.span - 1
        keys = visible(spec, where, b, t) if not first else np.nonzero(ends <= t + first)[0]
        chosen = got[b, t][got[b, t] >= 0]
        assert len(chosen) == min(spec.top, len(keys)) == len(set(chosen.tolist()))
        assert (got[b, t][len(chosen):] == -1).all()
        assert set(chosen.tolist()) <= set(keys.tolist())
        best = np.sort(score(index, b, t, keys))[::-1][:len(chosen)]
        np.testing.assert_allclose(score(index, b, t, chosen), best, atol=1e-4)
        some += len(chosen)
    assert some or not spec.keys


def check_select(spec, target, backend="mosaic_gpu"):
    index, where = spec.arguments(dtype="bfloat16")
    check_chosen(spec, index, where, select(spec, index, where, target, backend))


@runs
@both
def test_it_chooses_the_best(gpu):
    check_select(specs.Spec(B=1, L=41, stride=3, span=3, late=True, documents=2), gpu(2))


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", SMALL)
def test_it_chooses_the_best_of_every_spec(name, gpu):
    check_select(SMALL[name], gpu(3))


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("first", [1, 470])
def test_queries_may_be_a_part_of_a_row(first, gpu):
    spec = specs.Spec(B=2, L=150, S=600, J=2, D=16, top=7)
    index, where = spec.arguments(dtype="bfloat16")
    got = select(spec, index, where, gpu(2), first=jnp.asarray(first, jnp.int32))
    check_chosen(spec, index, where, got, first)


def lists(spec):
    """Keys of an index, some of them outside, some queries with none, and attention's mass."""
    rng = np.random.default_rng(6)
    chosen = np.full((spec.B, spec.L, spec.top), -1)
    for b, t in np.ndindex(spec.B, spec.L):
        some = rng.permutation(spec.keys)[:spec.top]
        chosen[b, t, :len(some)] = some
    chosen = np.where(rng.random(chosen.shape) < 0.2, spec.keys + 3, chosen)
    chosen[0, 0] = -1
    listed = (chosen >= 0) & (chosen < spec.keys)
    mass = np.where(listed, rng.random(chosen.shape) + 0.1, 7).astype(np.float32)
    return chosen, mass, listed


def oracle(spec, index, chosen, mass, listed, g):
    """Loss and gradients, one query and head at a time in float64."""
    q, k, w = (np.asarray(x, np.float64) for x in index)
    loss, dq, dk, dw = np.zeros(chosen.shape[:2]), *(np.zeros(x.shape) for x in (q, k, w))
    for b, t in np.ndindex(loss.shape):
        keys = chosen[b, t][listed[b, t]]
        if not len(keys):
            continue
        p = mass[b, t][listed[b, t]].astype(np.float64)
        scores = score(index, b, t, keys)
        loss[b, t] = divergence(scores, p)
        share = np.exp(scores - scores.max())
        slope = (share / share.sum() - p / p.sum()) * g[b, t] * SCALE
        for j in range(spec.J):
            raw = k[b, keys] @ q[b, t, j]
            part = np.where(raw > 0, slope, 0)
            dw[b, t, j] = (part * raw).sum()
            dq[b, t, j] = w[b, t, j] * part @ k[b, keys]
            dk[b, keys] += np.outer(part * w[b, t, j], q[b, t, j])
    return dict(zip(NAMES, (loss, dq, dk, dw), strict=True))


def check_listed(spec, target, backend="mosaic_gpu"):
    index, _ = spec.arguments(dtype="bfloat16")
    chosen, mass, listed = lists(spec)
    g = np.random.default_rng(8).normal(size=chosen.shape[:2]).astype(np.float32)

    @jax.jit
    def run(q, k, w, chosen, mass, g):
        with device.assume(target):
            call = functools.partial(index_kl_listed, chosen_BxLxN=chosen, mass_BxLxN=mass,
                                     scale=SCALE, implementation=backend)
            loss, pull = jax.vjp(call, q, k, w)
            return dict(zip(NAMES, (loss, *pull(g)), strict=True))

    arguments = (*index, jnp.asarray(chosen, jnp.int32), jnp.asarray(mass), jnp.asarray(g))
    got, again = run(*arguments), run(*arguments)
    for n in NAMES:
        assert np.asarray(got[n]).tobytes() == np.asarray(again[n]).tobytes(), n
    assert [got[n].dtype.name for n in NAMES] == ["float32"] + ["bfloat16"] * 3
    want = oracle(spec, index, chosen, mass, listed, g)
    np.testing.assert_allclose(got.pop("loss"), want.pop("loss"), atol=2e-5)
    assert numerics.report(got, want, dtype="bfloat16", factor=0.4) is None


@runs
@pytest.mark.parametrize("gpu", [hopper, pytest.param(blackwell, marks=pytest.mark.slow)])
def test_the_divergence_over_listed_keys_and_its_gradients(gpu):
    check_listed(specs.Spec(B=1, L=3, S=70, top=65), gpu(2))


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", [n for n in SMALL if n != "parts"])
def test_the_divergence_of_every_spec(name, gpu):
    check_listed(SMALL[name], gpu(3))


def test_memory_is_enough_for_every_size():
    for J in (1, 4, 8, 9, 33, 64, 100, 128):
        for D in (8, 64, 72, 128):
            for S in (1, 128, 129, 5000):
                size = gpu_plan.Scores(J, D, S)
                assert size.J <= size.heads <= size.columns <= gpu_plan.COLUMNS
                assert gpu_plan.QUERIES % size.together == size.columns % 16 == 0  # Blackwell's
                slots = size.slots(size.parts)
                keys = size.keys * (2 * size.width + 8)
                queries = slots * size.columns * (2 * size.width + 4)
                assert slots >= 2
                assert keys + queries + size.together * size.keys * 4 <= gpu_plan.SHARED
                whole = gpu_plan.Scores(J, D, gpu_plan.whole(S, size.keys))
                assert whole.keys == size.keys


def _arguments(dtype="bfloat16", J=64, D=128):
    shape = jax.ShapeDtypeStruct
    return shape((2, 16, J, D), dtype), shape((2, 16, D), dtype), shape((2, 16, J), dtype)


REFUSED = {
    "cpu": (device.Target("cpu"), {}, "needs an NVIDIA GPU, the device is cpu"),
    "tpu": (CHIPS["v5p"].target, {}, "the device is TPU v5"),
    "dtype": (CHIPS["h200"].target, {"dtype": "float32"}, "q is float32"),
    "width": (CHIPS["h200"].target, {"D": 130}, "widths up to 128, D is 130"),
    "heads": (CHIPS["h100"].target, {"J": 129}, "heads, J is 129"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]
    chosen = jax.ShapeDtypeStruct((2, 16, 4), jnp.int32)
    mass = jax.ShapeDtypeStruct((2, 16, 4), jnp.float32)
    with device.assume(target):
        assert indexer.explain(*_arguments(), top=4)["mosaic_gpu"] is None or not changes
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            index_select(*_arguments(**changes), top=4, implementation="mosaic_gpu")
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            index_kl_listed(*_arguments(**changes), chosen, mass, implementation="mosaic_gpu")
