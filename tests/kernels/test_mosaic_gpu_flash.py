"""flash's Mosaic GPU kernels, interpreted with race detection, against dense attention in float64.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its generation on it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.flash import flash, gpu_plan, op, pairs, specs
from kernels_pallas.flash.table import table_of
from tests.kernels.test_flash import _numpy, _seen
from tests.kernels.test_mosaic_gpu import both, recent, runs

SMALL = specs.PARITY | {n: s for n, s in specs.HOPPER.items() if n.startswith("tile_")}
# Tables with documents, a window and late keys, and rows that see nothing.
_QUICK = ("loop_window", "loop_unseen", "loop_ends_window", "tile_all")


def compiled(gpu, spec, options, cores=2, gradients=True, backend="mosaic_gpu"):
    """Values and gradients from the kernels, for any numbers of one workload's shapes."""
    names = ("dq", "dk", "dv", "dsinks")[:4 if spec.sinks else 3]

    @jax.jit
    def run(arguments, arrays, cotangents):
        arrays = dict(arrays)
        sinks = [arrays.pop("sinks_H")] if spec.sinks else []

        def call(q, k, v, *sinks):
            given = {"sinks_H": sinks[0]} if sinks else {}
            return flash(q, k, v, implementation=backend,
                         **options | arrays | given | {"return_lse": True})

        with device.assume(gpu(cores)):
            if not gradients:
                return dict(zip(("o", "lse"), call(*arguments, *sinks), strict=True))
            out, pull = jax.vjp(call, *arguments, *sinks)
            return dict(zip(("o", "lse", *names), (*out, *pull(cotangents)), strict=True))

    return run


def check(gpu, spec, cores=2, change=None, gradients=True, backend="mosaic_gpu",
          dtype="bfloat16"):
    """Hold one call against the formulas, and a second against its bits; return the first."""
    spec = dataclasses.replace(spec, lse=True)
    arguments, keywords = spec.arguments(dtype=dtype)
    if change is not None:
        arguments = change(*arguments)
    arrays = {n: x for n, x in keywords.items() if isinstance(x, jax.Array)}
    options = {n: x for n, x in keywords.items() if n not in arrays}
    rows = (spec.B, spec.L, spec.H)
    cotangents = tuple(numerics.uniform_like(
        (jax.ShapeDtypeStruct((*rows, spec.Dv), dtype),
         jax.ShapeDtypeStruct(rows, jnp.float32)), seed=7))
    run = compiled(gpu, spec, options, cores, gradients, backend)
    got, again = (run(arguments, arrays, cotangents) for _ in range(2))
    for name, x in got.items():
        assert np.asarray(x).tobytes() == np.asarray(again[name]).tobytes(), name
    want = _numpy(spec, arguments, keywords, cotangents)
    want = want if gradients else {n: want[n] for n in ("o", "lse")}
    assert {n: (x.shape, x.dtype.name) for n, x in got.items()} == {
        n: (x.shape, "float32" if n == "lse" else dtype) for n, x in want.items()}
    unseen = want["lse"] < -1e29
    np.testing.assert_array_equal(np.asarray(got["lse"])[unseen], np.float32(-1e30))
    assert not np.asarray(got["o"], np.float32)[unseen].any()
    held = dict(got, lse=np.where(unseen, 0, np.asarray(got["lse"])))
    want["lse"] = np.where(unseen, 0, want["lse"])
    if dtype == "float32":
        assert all(numerics.error(x, want[n], floor=1.0) < 1e-5 for n, x in held.items())
    else:
        assert numerics.report(held, {n: want[n] for n in held}, factor=0.4, dtype=dtype,
                               floor=1e-3) is None
    assert numerics.error(held["lse"], want["lse"], floor=1.0) < 1e-5
    return got


@runs
@both
def test_all_that_masks_and_bends_at_once(gpu):
    """Forward alone: a gradient has three kernels, a dozen seconds to interpret."""
    check(gpu, dataclasses.replace(specs.HOPPER["tile_all"], L=100), gradients=False)


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", SMALL)
def test_every_small_spec(name, gpu):
    check(gpu, SMALL[name], 3)


@runs
@pytest.mark.slow
@both
def test_large_and_tiny_numbers(gpu):
    spec = specs.HOPPER["tile_group"]
    scale = jnp.asarray([1e4, 1e-30, 1, 1, 1, 1], jnp.bfloat16)[None, None, :, None]
    got = check(gpu, dataclasses.replace(spec, L=70),
                change=lambda q, k, v: (q * scale, k * jnp.asarray(1e-2, k.dtype), v))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("first", [0, 37, 150])
def test_queries_may_be_a_part_of_a_row(first, gpu):
    check_part(gpu, first)


def check_part(gpu, first, backend="mosaic_gpu"):
    """Hold a call whose first query's place is data against the reference in float64."""
    spec = specs.Spec(B=2, L=70, S=200, H=2, K=1, window=90)
    arguments, keywords = spec.arguments(dtype="bfloat16")
    options = {n: x for n, x in keywords.items() if not isinstance(x, jax.Array)}
    cotangents = tuple(numerics.uniform_like(
        (jax.ShapeDtypeStruct((2, 70, 2, 32), jnp.bfloat16),
         jax.ShapeDtypeStruct((2, 70, 2), jnp.float32)), seed=7))
    arrays = {"first": jnp.asarray(first, jnp.int32)}
    got = compiled(gpu, spec, options, backend=backend)(arguments, arrays, cotangents)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
        out, pull = jax.vjp(lambda *a: flash(*a, implementation="reference", first=first,
                                             **options | {"return_lse": True}), *wide)
        gradients = pull(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in cotangents))
    seen = np.asarray(out[1]) > -1e29
    for name, want in zip(("o", "dq", "dk", "dv"), (out[0], *gradients), strict=True):
        assert numerics.error(got[name], want, floor=1e-3) < 1.2e-2, name
    np.testing.assert_allclose(np.asarray(got["lse"])[seen], np.asarray(out[1])[seen], atol=1e-5)


@pytest.mark.parametrize("name", [
    name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL])
def test_tiles_meet_every_pair_that_is_seen(name):
    """No pair is left out, whole steps are seen whole, and both tables tell of the same pairs."""
    spec = SMALL[name]
    arguments, keywords = spec.arguments(dtype="bfloat16")
    marks = pairs.Marks(*(keywords.get(n) for n in ("segments_q", "segments_k", "ends_BxS")))
    strided = marks.ends is not None or (spec.stride, spec.span) != (1, 1)
    S = spec.S or spec.L
    seen = np.broadcast_to(_seen(spec, keywords)[:, 0], (spec.B, spec.L, S))
    X, STEP = gpu_plan.X, gpu_plan.STEP
    for rows in (X, 2 * X):  # of a tile of queries forward, on Hopper and Blackwell
        plan = gpu_plan.plan_of(*arguments, marks, scale=1.0, causal=spec.causal, tall=rows,
                                window=spec.window, softcap=None, stride=spec.stride,
                                span=spec.span, offset=0 if strided else S - spec.L)
        table = jax.jit(functools.partial(table_of, plan))(marks)
        tables = [(X, STEP, table.keys)]
        if rows > X:
            tables.append((rows, STEP, jax.jit(gpu_plan.of_pairs)(table.keys)))
        else:
            tables.append((X, 2 * STEP, jax.jit(gpu_plan.of_wide)(table.keys)))
        for size, step, keys in tables:
            met = np.zeros((spec.B, plan.L, plan.S), bool)
            for (b, i), (low, plain, masked, high) in zip(
                    np.ndindex(keys.shape[:2]), np.asarray(keys).reshape(-1, 4), strict=True):
                assert 0 <= low <= plain <= masked <= high <= plan.S // step
                assert i * size < spec.L or low == high  # nothing is read for padding
                mine = slice(i * size, min((i + 1) * size, spec.L))
                met[b, mine, low * step:high * step] = True
                if not plan.marked:
                    assert plain == masked or masked * step <= S
                    assert plain == low or spec.window is not None
                    assert seen[b, mine, plain * step:masked * step].all()
            assert not (seen & ~met[:, :spec.L, :S]).any()
        by_key = np.zeros((spec.B, plan.L, plan.S), bool)
        for (b, j), (low, high) in zip(
                np.ndindex(table.queries.shape[:2]), np.asarray(table.queries).reshape(-1, 2),
                strict=True):
            assert 0 <= low <= high <= plan.L // STEP
            by_key[b, low * STEP:high * STEP, j * X:(j + 1) * X] = True
        assert not (seen & ~by_key[:, :spec.L, :S]).any()


def test_documents_and_windows_are_skipped():
    spec = specs.Spec(B=1, L=4096, H=1, K=1)
    q, k, v = spec.arguments(dtype="bfloat16")[0]

    def steps(window, segments):
        marks = pairs.Marks(segments, segments)
        plan = gpu_plan.plan_of(q, k, v, marks, scale=1.0, causal=True, window=window,
                                softcap=None)
        keys = np.asarray(jax.jit(functools.partial(table_of, plan))(marks).keys)
        return (keys[..., 3] - keys[..., 0]).sum()

    documents = jnp.asarray(np.arange(4096)[None] // 512 + 1, jnp.int32)
    assert steps(None, None) == sum(2 * (i + 1) for i in range(32))
    assert steps(None, documents) == 8 * sum(2 * (i + 1) for i in range(4))
    assert steps(128, None) == 2 + 31 * 4


REFUSED = {
    "cpu": (device.Target("cpu"), {}, {}, "needs an NVIDIA GPU, the device is cpu"),
    "ampere": (device.Target("gpu", "A100", (8, 0)), {}, {}, r"needs Hopper .* is \(8, 0\)"),
    "blackwell": (CHIPS["b200"].target, {"Dk": 200}, {}, "Dk up to 192, it is 200"),
    "dtype": (CHIPS["h200"].target, {"dtype": "float32"}, {}, "q is float32"),
    "Dk": (CHIPS["h200"].target, {"Dk": 200}, {}, "Dk up to 192, it is 200"),
    "Dv": (CHIPS["h200"].target, {"Dv": 136}, {}, "Dv up to 128, it is 136"),
    "scale": (CHIPS["h100"].target, {}, {"scale": -1.0}, "scale is -1.0"),
}


def _arguments(dtype="bfloat16", Dk=192, Dv=128):
    shape = jax.ShapeDtypeStruct
    return (shape((1, 8, 4, Dk), dtype), shape((1, 8, 2, Dk), dtype), shape((1, 8, 2, Dv), dtype))


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, others, reason = REFUSED[name]
    keywords = {"scale": 1.0} | others
    with device.assume(target):
        if changes or others:
            assert op.explain(*_arguments(), scale=1.0)["mosaic_gpu"] is None
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            flash(*_arguments(**changes), implementation="mosaic_gpu", **keywords)
