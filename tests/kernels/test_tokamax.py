"""Tokamax behind our signatures: layouts, masks and weights carry over, and what it has not.

Its kernels need their chips; here the same calls run through its XLA forms where it is installed,
and through JAX's own functions of the same signatures everywhere.
"""

import dataclasses
import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import bench, device, numerics, others
from kernels_pallas.chips import CHIPS
from kernels_pallas.cross_entropy import op as cross_entropy_op
from kernels_pallas.cross_entropy import peers as cross_entropy_peers
from kernels_pallas.cross_entropy import specs as cross_entropy_specs
from kernels_pallas.flash import explain, flash
from kernels_pallas.flash import peers as flash_peers
from kernels_pallas.flash import specs as flash_specs
from kernels_pallas.grouped_matmul import op as grouped_matmul_op
from kernels_pallas.grouped_matmul import peers as grouped_matmul_peers
from kernels_pallas.grouped_matmul import specs as grouped_matmul_specs
from kernels_pallas.op import Backend, Op

INSTALLED = importlib.util.find_spec("tokamax") is not None


def _attention(q, k, v, *, logits_soft_cap, **keywords):
    assert logits_soft_cap is None
    return jax.nn.dot_product_attention(q, k, v, **keywords)


def _loss(x, labels, weights, *, reduction, implementation):
    assert reduction == "none"
    assert implementation == "xla"
    logits = jnp.dot(x, weights)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


@pytest.fixture(params=["jax's own", "tokamax"])
def peer(request, monkeypatch):
    if request.param == "tokamax":
        if not INSTALLED:
            pytest.skip("tokamax is not installed")
        return
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(
        ragged_dot=lambda x, w, sizes, implementation: jax.lax.ragged_dot(x, w, sizes),
        dot_product_attention=_attention, linear_softmax_cross_entropy_loss=_loss))


def compare(ours, theirs, arguments, wrt, counting=None):
    """Values and gradients of the peer in float32 against the reference in float64."""
    def run(f, arguments, cotangent):
        def some(*chosen):
            whole = [*arguments]
            for i, x in zip(wrt, chosen, strict=True):
                whole[i] = x
            out = f(*whole)
            return out if counting is None else out * counting.astype(out.dtype)

        out, pull = jax.vjp(some, *(arguments[i] for i in wrt))
        return out, pull(jax.tree.map(lambda d, o: jnp.asarray(d, o.dtype), cotangent, out))

    shapes = jax.eval_shape(theirs, *arguments)
    cotangent = numerics.uniform_like(shapes, seed=3)
    got = run(theirs, arguments, cotangent)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64)
                            if jnp.issubdtype(a.dtype, jnp.floating) else np.asarray(a), arguments)
        want = run(ours, wide, cotangent)
    assert numerics.report(got, want, floor=0.1) is None


def wide(arguments):
    return tuple(a.astype(jnp.float32) if hasattr(a, "dtype") and a.dtype == jnp.bfloat16 else a
                 for a in arguments)


@pytest.mark.parametrize(
    "name", ["tile_edges", pytest.param("one_takes_all", marks=pytest.mark.slow), "nothing"])
def test_grouped_matmul(peer, name):
    (x, w, layout), keywords = grouped_matmul_specs.PARITY[name].arguments()
    assert not keywords
    x, w = wide((x, w))
    mine = np.zeros((layout.rows, 1))
    for start, size in zip(layout.starts, layout.sizes, strict=True):
        mine[int(start):int(start + size)] = 1
    compare(lambda x, w: grouped_matmul_op(x, w, layout, implementation="reference"),
            lambda x, w: grouped_matmul_peers.tokamax(x, w, layout, implementation="xla"),
            (x, w), (0, 1), jnp.asarray(mine, jnp.float32))


@pytest.mark.parametrize("changes", [
    {"H": 4, "K": 2}, pytest.param({"window": 7}, marks=pytest.mark.slow),
    pytest.param({"causal": False, "S": 24}, marks=pytest.mark.slow)], ids=str)
def test_flash(peer, changes):
    arguments, keywords = flash_specs.Spec(**{"L": 40, "Dk": 16, "Dv": 16} | changes).arguments()
    compare(functools.partial(flash, implementation="reference", **keywords),
            functools.partial(flash_peers.tokamax, implementation="xla", **keywords),
            wide(arguments), (0, 1, 2))


@pytest.mark.parametrize("head_layout", ["DV", "VD"])
def test_cross_entropy(peer, head_layout):
    spec = cross_entropy_specs.Spec(T=37, D=24, V=50, padding=True, head_layout=head_layout)
    arguments, _ = spec.arguments()
    options = {"z_loss": 0.0, "softcap": None, "chunk": None, "head_layout": head_layout}
    reference = functools.partial(cross_entropy_op["reference"].fn, **options)
    compare(lambda *a: reference(*a)[0],
            lambda *a: cross_entropy_peers.tokamax(*a, implementation="xla", **options)[0],
            wide(arguments), (0, 1))


def test_what_it_has_not_is_refused(monkeypatch):
    arguments, keywords = flash_specs.Spec(L=128, dtype="bfloat16").arguments()

    def verdict(**more):
        return explain(*arguments, **keywords | more)["tokamax"]

    assert verdict() == "needs a GPU or a TPU, the device is cpu"
    with device.assume(CHIPS["h200"].target):
        monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
        assert verdict() == "tokamax is not installed"
        monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: object())
        assert "cannot be compiled for another, NVIDIA H200" in verdict()
        monkeypatch.setattr(device, "assumed", lambda: False)
        assert verdict() is None
        assert verdict(return_lse=True) == "Tokamax has no return_lse"
        spec = cross_entropy_specs.Spec(T=8, dtype="bfloat16")
        given, options = spec.arguments()
        assert "no kernel of it for GPUs" in cross_entropy_op.explain(
            *given, **{"z_loss": 0.0, "softcap": None, "chunk": None, "head_layout": "DV"}
            | options)["tokamax"]


def test_its_search_is_in_force_while_the_call_is_traced(monkeypatch):
    """As its documentation has it: `with autotune(f, *args):` around what is traced anew."""
    seen = []

    class Found:
        def __enter__(self):
            seen.append("in force")

        def __exit__(self, *error):
            seen.append("over")

    def autotune(f, *arguments, progress_bar):
        jax.eval_shape(f, *arguments)
        seen.append("searched")
        return Found()

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(autotune=autotune))
    (case,) = bench.cases(("linear",), ("one_row",))

    def traced(x, w):
        seen.append("traced")
        return x @ w.astype(x.dtype)

    op = Op("linear", (Backend("tokamax", traced),))
    case = dataclasses.replace(case, op=op, call=op)
    (row,) = bench.bench_case(case, case.make(), "forward", ["tokamax"], 2, 1.0, tune=True)
    assert row.error is None
    assert row.median is not None
    assert seen == ["traced", "searched", "in force", "traced", "over"]
