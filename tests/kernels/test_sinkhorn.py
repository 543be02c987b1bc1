"""sinkhorn: every backend, kernels interpreted with race detection, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.sinkhorn import explain, gpu_plan, op, sinkhorn, specs
from tests.kernels.test_mosaic_gpu import either, recent, runs
from tests.kernels.test_mosaic_tpu import chip

ANYWHERE = [backend.name for backend in op.backends if not backend.name.startswith("mosaic")]


def balanced(logits, iterations, eps):
    """The matrices, in numpy."""
    m = np.exp(logits - logits.max(-1, keepdims=True))
    m = m / m.sum(-1, keepdims=True) + eps
    m = m / (m.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return m


def oracle(logits, dy, **keywords):
    """Values, and gradients by differences: all matrices at once, a number of each at a time."""
    logits, dy = (np.asarray(x, np.float64) for x in (logits, dy))
    gradient, step = np.zeros_like(logits), 1e-5
    for i, j in np.ndindex(logits.shape[1:]):
        up, down = logits.copy(), logits.copy()
        up[:, i, j] += step
        down[:, i, j] -= step
        change = (balanced(up, **keywords) - balanced(down, **keywords)) / (2 * step)
        gradient[:, i, j] = (change * dy).sum((1, 2))
    return {"m": balanced(logits, **keywords), "gradient": gradient}


def check(spec, backend, target=None):
    (logits,), keywords = spec.arguments()
    dy = numerics.normal(logits.shape, logits.dtype, seed=5)

    @jax.jit
    def run(logits, dy):
        with device.assume(target or device.target()):
            m, pull = jax.vjp(
                lambda x: sinkhorn(x, implementation=backend, **keywords), logits)
            return {"m": m, "gradient": pull(dy)[0]}

    got, again = run(logits, dy), run(logits, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert numerics.report(got, oracle(logits, dy, **keywords)) is None


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("name", ["once", "two", "one"])
def test_values_and_gradients(name, backend):
    check(specs.PARITY[name], backend)


@runs
@pytest.mark.parametrize("name", ["once", "two"])
def test_values_and_gradients_on_a_gpu(name):
    check(specs.PARITY[name], "mosaic_gpu", either(2))


def test_values_and_gradients_on_a_tpu():
    check(specs.Spec(R=3, iterations=4, T=1030), "mosaic_tpu", chip())  # two programs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, backend):
    check(specs.PARITY[name], backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec_on_a_tpu(name):
    check(specs.PARITY[name], "mosaic_tpu", chip())


@runs
@pytest.mark.slow
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec_on_a_gpu(name):
    check(specs.PARITY[name], "mosaic_gpu", either(2))


@pytest.mark.parametrize(("target", "shape", "iterations", "backend", "reason"), [
    (device.Target("cpu"), (3, 4, 4), 20, "mosaic_gpu", "needs an NVIDIA GPU, the device is cpu"),
    (device.Target("gpu", "A100", (8, 0)), (3, 4, 4), 20, "mosaic_gpu",
     r"needs Hopper \(9.0\) or Blackwell \(10.0\), the device A100 is \(8, 0\)"),
    (CHIPS["h200"].target, (3, 9, 9), 20, "mosaic_gpu", r"up to 8 rows, logits are \(3, 9, 9\)"),
    (CHIPS["h200"].target, (3, 8, 8), 40, "mosaic_gpu",
     "40 iterations of 8 rows take 327680 bytes of 231424"),
    (CHIPS["h200"].target, (3, 4, 4), 20, "mosaic_tpu", "needs a TPU, the device is NVIDIA H200"),
    (CHIPS["v6e"].target, (3, 17, 17), 20, "mosaic_tpu", r"up to 16 rows, logits are \(3, 17, 17"),
    (CHIPS["v5p"].target, (3, 16, 16), 400, "mosaic_tpu", "of 16 rows take 58654720 bytes of"),
])
@recent
def test_what_is_not_served_is_refused_with_a_reason(target, shape, iterations, backend, reason):
    with device.assume(target):
        x = jnp.zeros(shape)
        assert explain(x, iterations=iterations, eps=0.0)["xla"] is None
        with pytest.raises(ValueError, match=f"'{backend}' cannot run: .*{reason}"):
            sinkhorn(x, iterations=iterations, eps=0.0, implementation=backend)


def test_memory_of_sums():
    assert gpu_plan.sums_bytes(4, 20) == 40 * 4 * 128 * 4


@pytest.mark.parametrize(("shape", "dtype", "changes", "says"), [
    ((3, 4), "float32", {}, r"logits \(3, 4\), expected square"),
    ((4, 4), "bfloat16", {}, "logits are bfloat16, expected float32"),
    ((4, 4), "float32", {"iterations": 0}, "iterations=0 must be a whole number above 0"),
    ((4, 4), "float32", {"eps": -1.0}, "eps=-1.0 must not be below 0"),
])
def test_mistakes_are_named(shape, dtype, changes, says):
    with pytest.raises(ValueError, match=says):
        sinkhorn(jnp.zeros(shape, dtype), **{"iterations": 2, "eps": 0.0, **changes})
