"""grouped_swiglu: every backend, kernels interpreted with race detection, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.grouped_matmul import aligned, visits
from kernels_pallas.grouped_matmul.layout import row_expert
from kernels_pallas.grouped_swiglu import explain, gpu_plan, grouped_swiglu, op, specs
from tests.kernels.test_mosaic_gpu import blackwell, both, hopper, recent, runs
from tests.kernels.test_mosaic_tpu import chip

NAMES = ("y", "dx", "dgate", "dup")
SMALL = specs.Spec(sizes=(3, 0, 130), D=64, F=192, w_dtype="float32")
ANYWHERE = [backend.name for backend in op.backends if not backend.name.startswith("mosaic")]


def oracle(x, gate, up, dy, layout):
    """Loop over experts in float64."""
    x, gate, up, dy = (np.asarray(a, np.float64) for a in (x, gate, up, dy))
    y, dx, dgate, dup = (np.zeros(a.shape) for a in (dy, x, gate, up))
    for e, (start, size) in enumerate(zip(np.asarray(layout.starts), np.asarray(layout.sizes),
                                          strict=True)):
        rows = slice(start, start + size)
        g, u = x[rows] @ gate[e], x[rows] @ up[e]
        s = 1 / (1 + np.exp(-g))
        y[rows] = g * s * u
        dg, du = dy[rows] * u * s * (1 + g * (1 - s)), dy[rows] * g * s
        dx[rows] = dg @ gate[e].T + du @ up[e].T
        dgate[e], dup[e] = x[rows].T @ dg, x[rows].T @ du
    return dict(zip(NAMES, (y, dx, dgate, dup), strict=True))


def check(spec, backend, dtype, target=None):
    """Hold values and gradients to the oracle, of the matrices as they are multiplied."""
    (x, gate, up, layout), _ = spec.arguments(dtype=dtype)
    used = np.asarray(row_expert(layout)[1])[:, None]
    if spec.w_dtype == "float32":
        gate, up = (w.astype(jnp.float32) for w in (gate, up))
    dy = numerics.normal((layout.rows, spec.F), x.dtype, seed=9) * jnp.asarray(used, x.dtype)

    @jax.jit
    def run(x, gate, up, dy):
        def call(x, gate, up):
            return grouped_swiglu(x, gate, up, layout, implementation=backend)

        with device.assume(target or device.target()):
            y, pull = jax.vjp(call, x, gate, up)
            return dict(zip(NAMES, (y, *pull(dy)), strict=True))

    got, again = run(x, gate, up, dy), run(x, gate, up, dy)
    for name in NAMES:
        assert np.asarray(got[name]).tobytes() == np.asarray(again[name]).tobytes(), name
    assert np.isfinite(np.asarray(got["y"], np.float32)).all()
    got["y"] = jnp.where(used, got["y"], jnp.zeros_like(got["y"]))
    assert [got[n].dtype for n in NAMES] == [x.dtype, x.dtype, gate.dtype, up.dtype]
    want = oracle(x, gate, up, dy, layout)
    assert numerics.report(got, want, dtype=dtype, factor=0.4 if target else 1) is None


@pytest.mark.parametrize(("backend", "dtype"), [("xla", "float32"), ("xla", "bfloat16"),
                                               ("reference", "float32")])
def test_values_and_gradients(backend, dtype):
    check(specs.Spec(sizes=(5, 0, 12, 1), D=24, F=20, block=8), backend, dtype)


@runs
@pytest.mark.parametrize("gpu", [hopper, pytest.param(blackwell, marks=pytest.mark.slow)])
def test_values_and_gradients_on_a_gpu(gpu):
    check(SMALL, "mosaic_gpu", "bfloat16", gpu(2))


@runs
def test_values_on_blackwell():
    """Forward alone: the gradients are grouped_matmul's, and take a dozen seconds to interpret."""
    (x, gate, up, layout), _ = SMALL.arguments(dtype="bfloat16")
    with device.assume(blackwell(2)):
        y = jax.jit(lambda *a: grouped_swiglu(*a, layout, implementation="mosaic_gpu"))(x, gate, up)
    used = np.asarray(row_expert(layout)[1])[:, None]
    want = oracle(x, gate, up, jnp.zeros_like(y), layout)["y"]
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert numerics.report(jnp.where(used, y, jnp.zeros_like(y)), want, factor=0.4) is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, backend):
    check(specs.PARITY[name], backend, "float32")


def test_values_and_gradients_on_a_tpu(monkeypatch):
    """Several tiles of rows and columns, groups that share a tile, and a width in two steps."""
    monkeypatch.setattr(visits, "_HEIGHTS", (32,))
    monkeypatch.setattr(visits, "_WIDTHS", (128,))
    monkeypatch.setattr(visits, "VMEM", 800_000)
    spec = specs.Spec(sizes=(3, 0, 70), D=256, F=192, block=16, w_dtype="float32")
    (*_, layout), _ = spec.arguments()
    assert visits.choose(layout, "swiglu_kept", spec.D, spec.F, 2) == (32, 128, 128)
    check(spec, "mosaic_tpu", "bfloat16", chip())


@pytest.mark.slow
@pytest.mark.parametrize("name", specs.PARITY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_spec_on_a_tpu(name, dtype):
    check(specs.PARITY[name], "mosaic_tpu", dtype, chip())


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec_on_a_gpu(name, gpu):
    check(specs.PARITY[name], "mosaic_gpu", "bfloat16", gpu(3))


def test_tiles_fit_in_shared_memory():
    for F in (64, 128, 320, 2048):
        n = gpu_plan.columns(F)
        assert gpu_plan.stages(n) >= 4
        assert gpu_plan.stages(n) * 2 * 64 * (128 + 2 * n) + 2 * 64 * 64 * 2 <= 227 * 1024 - 2048


@recent
@pytest.mark.parametrize(("target", "D", "backend", "reason"), [
    (device.Target("cpu"), 64, "mosaic_gpu", "needs an NVIDIA GPU, the device is cpu"),
    (CHIPS["h200"].target, 96, "mosaic_gpu", "widths in multiples of 64, D is 96"),
    (CHIPS["h200"].target, 64, "mosaic_tpu", "needs a TPU, the device is NVIDIA H200"),
    (CHIPS["v6e"].target, 40001, "mosaic_tpu", "a multiple of 128, D is 40001"),
])
def test_what_is_not_served_is_refused_with_a_reason(target, D, backend, reason):
    x, w, layout = (jax.eval_shape(lambda: specs.Spec(sizes=(5, 0), D=D, F=64).arguments()[0])[i]
                    for i in (0, 1, 3))
    with device.assume(target):
        assert explain(x, w, w, layout)["xla"] is None
        with pytest.raises(ValueError, match=f"'{backend}' cannot run: .*{reason}"):
            grouped_swiglu(x, w, w, layout, implementation=backend)


@pytest.mark.parametrize(("gate", "up", "says"), [
    ((2, 8, 4), (2, 8, 5), r"gate \(2, 8, 4\) and up \(2, 8, 5\) do not fit x \(\d+, 8\)"),
    ((3, 8, 4), (3, 8, 4), "a layout of 2 experts"),
])
def test_mistakes_are_named(gate, up, says):
    layout = aligned(jnp.asarray([1, 2], jnp.int32), pairs=3)
    with pytest.raises(ValueError, match=says):
        grouped_swiglu(jnp.zeros((layout.rows, 8)), jnp.zeros(gate), jnp.zeros(up), layout)
