"""compress: every backend, kernels interpreted with race detection, against float64 loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.compress import compress, explain, op, specs, tpu_plan
from tests.kernels.test_mosaic_gpu import either, recent, runs
from tests.kernels.test_mosaic_tpu import chip

ANYWHERE = [backend.name for backend in op.backends if not backend.name.startswith("mosaic")]
SMALL = specs.Spec(B=1, M=4, R=2, C=128, alone=0.4)


def oracle(own, bias, follows, dy):
    """Entries and gradients, a block at a time in float64."""
    own, bias, dy = (np.asarray(x, np.float64) for x in (own, bias, dy))
    B, M, R, _, S, C = own.shape
    y, d_own, d_bias = np.zeros((B, M, C)), np.zeros_like(own), np.zeros_like(bias)
    for b, i in np.ndindex(B, M):
        tokens = [(i, r, S - 1) for r in range(R)]
        if S == 2 and i and follows[b, i]:
            tokens += [(i - 1, r, 0) for r in range(R)]
        logits = np.stack([own[b, j, r, 1, s] + bias[r, s] for j, r, s in tokens])
        values = np.stack([own[b, j, r, 0, s] for j, r, s in tokens])
        p = np.exp(logits - logits.max(0))
        p /= p.sum(0)
        y[b, i] = (p * values).sum(0)
        for n, (j, r, s) in enumerate(tokens):
            slope = p[n] * dy[b, i] * (values[n] - y[b, i])
            d_own[b, j, r, 0, s] += p[n] * dy[b, i]
            d_own[b, j, r, 1, s] += slope
            d_bias[r, s] += slope
    return {"y": y, "d_own": d_own, "d_bias": d_bias}


def check(spec, backend, dtype, target=None):
    (own, bias, follows), _ = spec.arguments(dtype=dtype)
    dy = numerics.normal((spec.B, spec.M, spec.C), own.dtype, seed=5)

    @jax.jit
    def run(own, bias, follows, dy):
        with device.assume(target or device.target()):
            y, pull = jax.vjp(
                lambda own, bias: compress(own, bias, follows, implementation=backend), own, bias)
            return dict(zip(("y", "d_own", "d_bias"), (y, *pull(dy)), strict=True))

    got, again = run(own, bias, follows, dy), run(own, bias, follows, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (got["y"].dtype, got["d_own"].dtype, got["d_bias"].dtype) == (
        own.dtype, own.dtype, bias.dtype)
    want = oracle(own, bias, np.asarray(follows), dy)
    assert numerics.report(got, want, dtype=dtype, factor=0.4 if target else 1) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ANYWHERE)
def test_values_and_gradients(backend, dtype):
    check(SMALL, backend, dtype)


@runs
def test_values_and_gradients_on_a_gpu():
    """Three programs for each entry."""
    check(dataclasses.replace(SMALL, C=384), "mosaic_gpu", "bfloat16", either(2))


def test_values_and_gradients_on_a_tpu():
    """Two programs, of which the second has one entry, that pools a block of the first."""
    spec = specs.Spec(B=1, M=tpu_plan.entries(2, 2, 128, 2) + 1, R=2, alone=0.2)
    (own, _, follows), _ = spec.arguments()
    assert own.shape[1] == 129
    assert follows[0, -1]
    check(spec, "mosaic_tpu", "bfloat16", chip())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, backend):
    check(specs.PARITY[name], backend, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*specs.PARITY, "long"])
def test_every_spec_on_a_tpu(name, dtype):
    long = specs.Spec(B=1, M=3, R=128, S=1, C=256)  # tokens in a loop
    check((specs.PARITY | {"long": long})[name], "mosaic_tpu", dtype, chip())


@runs
@pytest.mark.slow
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec_on_a_gpu(name):
    check(specs.PARITY[name], "mosaic_gpu", "bfloat16", either(2))


@recent
def test_any_number_of_entries_makes_a_grid_that_cuda_takes(monkeypatch):
    """A grid's last dim is CUDA's first; of those before it there are at most 65,535 programs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    grids = []
    kernel = plgpu.kernel
    monkeypatch.setattr(plgpu, "kernel", lambda *args, grid, **keywords: (
        grids.append(grid), kernel(*args, grid=grid, **keywords))[1])
    M, R, C = 70000, 4, 512

    def run(own, bias, follows, dy):
        with device.assume(CHIPS["h200"].target):
            return jax.vjp(lambda own: compress(own, bias, follows, implementation="mosaic_gpu"),
                           own)[1](dy)

    jax.eval_shape(run, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((1, M, R, 2, 2, C), jnp.bfloat16), ((R, 2, C), jnp.float32), ((1, M), bool),
        ((1, M, C), jnp.bfloat16))))
    assert len(grids) == 2
    for *others, last in grids:
        assert int(np.prod(others)) * last == 2 * M
        assert max(others, default=1) <= 65535


@recent
@pytest.mark.parametrize(("target", "changes", "backend", "reason"), [
    (device.Target("cpu"), {}, "mosaic_gpu", "needs an NVIDIA GPU, the device is cpu"),
    (CHIPS["h200"].target, {"dtype": "float32"}, "mosaic_gpu", "own is float32"),
    (CHIPS["h200"].target, {"R": 128}, "mosaic_gpu", "up to 16 tokens, R is 128"),
    (CHIPS["h100"].target, {"C": 96}, "mosaic_gpu",
     r"channels in multiples of 128, own is \(2, 2, 4, 2, 2, 96"),
    (CHIPS["h100"].target, {}, "mosaic_tpu", "needs a TPU, the device is NVIDIA H100"),
    (CHIPS["v6e"].target, {"C": 96}, "mosaic_tpu", "channels in multiples of 128"),
    (CHIPS["v5p"].target, {"R": 999}, "mosaic_tpu", "999 tokens and 2 x 128 channels take [0-9]+"),
])
def test_what_is_not_served_is_refused_with_a_reason(target, changes, backend, reason):
    arguments, _ = specs.Spec(**{"M": 2, "dtype": "bfloat16", **changes}).arguments()
    with device.assume(target):
        assert explain(*arguments)["xla"] is None
        with pytest.raises(ValueError, match=f"'{backend}' cannot run: .*{reason}"):
            compress(*arguments, implementation=backend)


@pytest.mark.parametrize(("own", "bias", "follows", "says"), [
    ((1, 2, 3, 2, 3, 8), (3, 3, 8), (1, 2), r"own \(1, 2, 3, 2, 3, 8\), expected .* 2 streams"),
    ((1, 2, 3, 2, 2, 8), (3, 8), (1, 2), r"bias \(3, 8\) and follows \(1, 2\) do not fit"),
    ((1, 2, 3, 2, 2, 8), (3, 2, 8), (1, 3), r"follows \(1, 3\) do not fit own"),
])
def test_mistakes_are_named(own, bias, follows, says):
    with pytest.raises(ValueError, match=says):
        compress(jnp.zeros(own), jnp.zeros(bias), jnp.zeros(follows, bool))
