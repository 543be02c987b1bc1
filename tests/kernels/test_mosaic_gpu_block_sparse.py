"""block_sparse's Mosaic GPU kernels, interpreted with race detection, against loops in float64.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its generation on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.block_sparse import block_sparse, explain, plan, specs
from kernels_pallas.chips import CHIPS
from tests.kernels.test_mosaic_gpu import blackwell, both, hopper, recent, runs

NAMES = ("o", "lse", "dq", "dk", "dv")
SMALL = [name for name in specs.HOPPER if name.startswith("tile_")]


def oracle(spec, arguments, cotangents):
    """Values and gradients, one query and head at a time in float64."""
    q, k, v, blocks, starts = (np.asarray(x, np.float64 if i < 3 else int)
                               for i, x in enumerate(arguments))
    do, d_lse = (np.asarray(x, np.float64) for x in cotangents)
    M, scale = starts.shape[1], spec.Dk**-0.5
    o, lse = np.zeros_like(do), np.full(d_lse.shape, -1e30)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, i, h in np.ndindex(lse.shape):
        own = h // (spec.H // spec.K)
        keys = {int(starts[b, m]) + n for m in blocks[b, i, h // (spec.H // spec.G)] if 0 <= m < M
                for n in range(spec.block)}
        if not keys:
            continue
        at = sorted(keys)
        scores = k[b, at, own] @ q[b, i, h] * scale
        lse[b, i, h] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        p = np.exp(scores - lse[b, i, h])
        o[b, i, h] = p @ v[b, at, own]
        d_scores = p * (v[b, at, own] @ do[b, i, h] - do[b, i, h] @ o[b, i, h] + d_lse[b, i, h])
        dq[b, i, h] = d_scores @ k[b, at, own] * scale
        dk[b, at, own] += np.outer(d_scores, q[b, i, h]) * scale
        dv[b, at, own] += np.outer(p, do[b, i, h])
    return dict(zip(NAMES, (o, lse, dq, dk, dv), strict=True))


def compiled(spec, target, backend="mosaic_gpu"):
    """Values and gradients from the kernels, for any numbers of one workload's shapes."""
    @jax.jit
    def run(q, k, v, blocks, starts, do, d_lse):
        def call(q, k, v):
            return block_sparse(q, k, v, blocks, starts, block=spec.block, scale=spec.Dk**-0.5,
                                return_lse=True, implementation=backend)

        with device.assume(target):
            out, pull = jax.vjp(call, q, k, v)
            return dict(zip(NAMES, (*out, *pull((do, d_lse))), strict=True))

    return run


def check(spec, run, arguments):
    """Hold one call against the oracle, and a second against its bits; return the first."""
    rows = (spec.B, spec.L, spec.H)
    cotangents = numerics.uniform_like(
        (jax.ShapeDtypeStruct((*rows, spec.Dv), jnp.bfloat16),
         jax.ShapeDtypeStruct(rows, jnp.float32)), seed=7)
    got, again = (run(*arguments, *cotangents) for _ in range(2))
    for name in NAMES:
        assert np.asarray(got[name]).tobytes() == np.asarray(again[name]).tobytes(), name
    want = oracle(spec, arguments, cotangents)
    assert {name: x.dtype.name for name, x in got.items()} == (
        dict.fromkeys(NAMES, "bfloat16") | {"lse": "float32"})
    unseen = want["lse"] < -1e29
    np.testing.assert_array_equal(np.asarray(got["lse"])[unseen], np.float32(-1e30))
    assert not np.asarray(got["o"], np.float32)[unseen].any()
    held = dict(got, lse=np.where(unseen, 0, np.asarray(got["lse"])))
    want["lse"] = np.where(unseen, 0, want["lse"])
    assert numerics.report(held, {n: want[n] for n in held}, factor=0.4, dtype="bfloat16",
                           floor=1e-3) is None
    assert numerics.error(held["lse"], want["lse"], floor=1.0) < 1e-5
    return got


# 66 queries of two heads, two choices each, over two blocks of 64: tiles hold 64 pairs.
EDGES = specs.Spec(B=1, L=66, S=128, H=2, K=1, G=1, N=2, Dk=64, Dv=64, block=64)


def edges():
    """65 queries choose one block and 63 the other; two choose one twice, one nothing."""
    arguments, _ = EDGES.arguments(dtype="bfloat16")
    blocks = np.full((1, 66, 1, 2), -1)
    blocks[0, 0, 0] = 99, -3
    blocks[0, 1:, 0, 0] = 0
    blocks[0, 1:64, 0, 1] = 1
    blocks[0, 64:, 0, 1] = 0
    return [*arguments[:3], jnp.asarray(blocks, jnp.int32), arguments[4]]


@runs
@pytest.mark.parametrize("gpu", [hopper, pytest.param(blackwell, marks=pytest.mark.slow)])
def test_tile_edges_repeated_and_absent_choices(gpu):
    got = check(EDGES, compiled(EDGES, gpu(2)), edges())
    assert not np.asarray(got["dq"], np.float32)[0, 0].any()  # a row that sees nothing


@runs
@pytest.mark.slow
@both
def test_large_and_tiny_numbers(gpu):
    q, k, v, blocks, starts = edges()
    sizes = jnp.asarray(10.0 ** np.resize([4, -30, 0, 2], 66), jnp.bfloat16)
    q = q * sizes[None, :, None, None]  # scores of 1e4: all of a row's weight on one key
    v = v * jnp.asarray(1e-3, jnp.bfloat16)
    got = check(EDGES, compiled(EDGES, gpu(2)), [q, k, v, blocks, starts])
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", SMALL)
def test_every_small_spec(name, gpu):
    spec = specs.HOPPER[name]
    check(spec, compiled(spec, gpu(2)), spec.arguments()[0])


@runs
@pytest.mark.slow
@both
def test_chunks_of_queries_add_up(gpu, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 128)
    spec = dataclasses.replace(specs.HOPPER["tile_any"], H=2)
    check(spec, compiled(spec, gpu(3)), spec.arguments()[0])


def _arguments(dtype="bfloat16", L=8, H=4, G=2, Dk=64, Dv=64):
    shape = jax.ShapeDtypeStruct
    return (shape((1, L, H, Dk), dtype), shape((1, 256, 1, Dk), dtype),
            shape((1, 256, 1, Dv), dtype), shape((1, L, G, 3), jnp.int32), shape((1, 4), jnp.int32))


REFUSED = {
    "cpu": (device.Target("cpu"), {}, {}, "needs an NVIDIA GPU, the device is cpu"),
    "ampere": (device.Target("gpu", "A100", (8, 0)), {}, {}, r"needs Hopper .* is \(8, 0\)"),
    "blackwell": (CHIPS["b200"].target, {"Dk": 192}, {}, "Dk is 192"),
    "dtype": (CHIPS["h200"].target, {"dtype": "float32"}, {}, "q is float32"),
    "Dk": (CHIPS["h200"].target, {"Dk": 192}, {}, "Dk is 192"),
    "Dv": (CHIPS["h100"].target, {"Dv": 80}, {}, "Dv is 80"),
    "block": (CHIPS["h100"].target, {}, {"block": 32}, "multiples of 64, block is 32"),
    "heads": (CHIPS["h100"].target, {"H": 256, "G": 1}, {}, "at most 128 heads .* there are 256"),
    "scale": (CHIPS["h100"].target, {}, {"scale": -1.0}, "scale is -1.0"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, others, reason = REFUSED[name]
    keywords = {"block": 64, "scale": 1.0}
    with device.assume(target):
        assert explain(*_arguments(), **keywords)["mosaic_gpu"] is None or not (changes or others)
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            block_sparse(*_arguments(**changes), implementation="mosaic_gpu",
                         **keywords | others)
