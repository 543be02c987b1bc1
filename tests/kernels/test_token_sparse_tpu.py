"""token_sparse's Mosaic TPU kernels, interpreted with race detection, against loops in float64.

Memory that nobody wrote reads as nan. On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same
tests on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.token_sparse import mass, op, specs, token_mass, token_sparse, tpu_plan
from tests.kernels import test_mosaic_gpu_token_sparse as gpu
from tests.kernels.test_mosaic_gpu_token_sparse import (
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


def test_list_edges_repeated_and_absent_tokens():
    got = check(EDGES, compiled(EDGES), edges())
    assert not np.asarray(got["dq"], np.float32)[0, 2].any()  # a row that sees nothing


@pytest.mark.slow
def test_large_and_tiny_numbers():
    q, kv, chosen = edges()
    q = q * jnp.asarray([1e4, 1e-30, 1], jnp.bfloat16)[None, :, None, None]
    got = check(EDGES, compiled(EDGES), [q, kv * jnp.asarray(1e-2, jnp.bfloat16), chosen])
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())


@pytest.mark.slow
def test_float32_is_not_rounded():
    spec = dataclasses.replace(specs.HOPPER["tile_past"], L=11, dtype="float32")
    arguments = spec.arguments()[0]
    rows = (spec.B, spec.L, spec.H)
    cotangents = numerics.uniform_like(
        (jax.ShapeDtypeStruct((*rows, spec.v_dim), jnp.float32),
         jax.ShapeDtypeStruct(rows, jnp.float32)), seed=7)
    got, want = compiled(spec)(*arguments, *cotangents), oracle(spec, arguments, cotangents)
    for name in NAMES:
        assert numerics.error(got[name], want[name], floor=1.0) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_small_spec(name):
    spec = specs.HOPPER[name]
    check(spec, compiled(spec), spec.arguments()[0])


@pytest.mark.slow
def test_chunks_of_queries_and_steps_of_lists_add_up(monkeypatch):
    monkeypatch.setattr(tpu_plan, "GATHERED", 4096)
    monkeypatch.setattr(tpu_plan, "_TOKENS", (128,))
    spec = dataclasses.replace(specs.HOPPER["tile_any"], B=2, L=11, S=150, N=260)
    plan = tpu_plan.plan_of("token_sparse", *spec.arguments()[0], v_dim=16, scale=1.0)
    plan = plan.sized("backward")
    assert (plan.steps, plan.chunk) == (3, 8)  # of 22 queries
    check(spec, compiled(spec), spec.arguments()[0])


def test_kernels_fit_in_fast_memory_and_lists_in_chunks():
    for H, Dk, v_dim in ((1, 8, 8), (8, 80, 64), (16, 576, 512), (128, 576, 512), (64, 128, 128)):
        for N in (1, 128, 129, 2048):
            for kernel in ("forward", "backward", "numbers", "slopes"):
                plan = tpu_plan.Plan("token_sparse", 1.0, v_dim, 2, 5000, 4096, H, N, Dk, 2)
                assert tpu_plan.fast_bytes(kernel, plan, 128) <= tpu_plan.VMEM
                plan = plan.sized(kernel)
                assert tpu_plan.fast_bytes(kernel, plan, plan.n) <= tpu_plan.VMEM
                assert N <= plan.listed < N + plan.n
                assert plan.chunk % tpu_plan.QUERIES == 0
                assert plan.chunk * plan.listed <= tpu_plan.GATHERED + 8 * plan.listed


TPU = CHIPS["v5p"].target
REFUSED = {
    "gpu": (CHIPS["h200"].target, {}, "needs a TPU, the device is NVIDIA H200"),
    "dtype": (TPU, {"dtype": "float16"}, "q is float16"),
    "memory": (TPU, {"Dk": 1 << 16}, "4 heads of 65536 take [0-9]+"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]
    lse = jax.ShapeDtypeStruct((1, 8, 4), jnp.float32)
    with device.assume(target):
        if changes:
            assert op.explain(*_arguments(), v_dim=64, scale=1.0)["mosaic_tpu"] is None
            assert mass.explain(*_arguments(), lse, scale=1.0)["mosaic_tpu"] is None
        with pytest.raises(ValueError, match=f"token_sparse: .* cannot run: .*{reason}"):
            token_sparse(*_arguments(**changes), v_dim=64, scale=1.0, implementation="mosaic_tpu")
        with pytest.raises(ValueError, match=f"token_mass: .* cannot run: .*{reason}"):
            token_mass(*_arguments(**changes), lse, scale=1.0, implementation="mosaic_tpu")
