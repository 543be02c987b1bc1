"""cross_entropy: every backend, the reference too, against dense logits in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from kernels_pallas.cross_entropy import cross_entropy, op, specs

FAST = [backend.name for backend in op.backends  # Tokamax has tests of its own
        if backend.name not in ("reference", "tokamax")]


def _results(implementation, arguments, keywords):
    x, head, targets, weights = arguments

    def loss(x, head):
        total, nll = cross_entropy(x, head, targets, weights, implementation=implementation,
                                   **keywords)
        return 1.5 * total, nll

    (total, nll), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, head)
    alone = jax.jit(loss)(x, head)  # evaluation takes another path
    return {"loss": total, "nll": nll, "dx": gradients[0], "dhead": gradients[1],
            "loss alone": alone[0], "nll alone": alone[1]}


def _numpy(spec, arguments):
    """Losses and gradients by the textbook's formulas, in numpy float64."""
    x, head, _, weights = (np.asarray(a, np.float64) for a in arguments)
    targets = np.asarray(arguments[2])
    head = head if spec.head_layout == "DV" else head.T
    logits, bent = x @ head, 1.0
    if spec.softcap is not None:
        bent = 1 - np.tanh(logits / spec.softcap) ** 2
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    lse = np.logaddexp.reduce(logits, axis=1)
    rows = np.arange(spec.T)
    nll = lse - logits[rows, targets]
    loss = 1.5 * (weights * (nll + spec.z_loss * lse**2)).sum()
    d_logits = np.exp(logits - lse[:, None]) * (1 + 2 * spec.z_loss * lse)[:, None]
    d_logits[rows, targets] -= 1
    d_logits *= 1.5 * weights[:, None] * bent
    dhead = x.T @ d_logits
    return {"loss": loss, "nll": nll, "dx": d_logits @ head.T,
            "dhead": dhead if spec.head_layout == "DV" else dhead.T,
            "loss alone": loss, "nll alone": nll}


def _check(backend, spec, dtype):
    arguments, keywords = spec.arguments(dtype=dtype)
    reason = op[backend].supports(*arguments, **keywords)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    got = _results(backend, arguments, keywords)
    assert numerics.report(got, _numpy(spec, arguments), dtype=dtype) is None
    assert got["dx"].dtype == arguments[0].dtype
    assert got["dhead"].dtype == arguments[1].dtype
    assert got["loss"].dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


@pytest.mark.parametrize("name", specs.PARITY)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_in_float64(backend, name):
    with jax.enable_x64(True):
        _check(backend, specs.PARITY[name], "float64")


@pytest.mark.parametrize(("name", "dtype"), [("plain", "float32"), ("all", "float32"),
                                             ("confident", "bfloat16"), ("all", "bfloat16")])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_rounded(backend, name, dtype):
    _check(backend, specs.PARITY[name], dtype)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_reference(name):
    with jax.enable_x64(True):
        _check("reference", specs.PARITY[name], "float64")


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        arguments, keywords = specs.Spec(T=9, D=5, V=7, softcap=2.0, z_loss=0.3, padding=True,
                                         chunk=4, std=3.0).arguments(dtype="float64")
        x, head, *rest = arguments
        run = jax.jit(lambda x, h: cross_entropy(x, h, *rest, **keywords)[0])
        dx, dhead = jax.grad(run, (0, 1))(x, head)
        rng, step = np.random.default_rng(0), 1e-6
        for _ in range(4):
            u, w = rng.standard_normal(x.shape), rng.standard_normal(head.shape)
            numeric = (run(x + step * u, head + step * w) - run(x - step * u, head - step * w))
            np.testing.assert_allclose(numeric / (2 * step), (dx * u).sum() + (dhead * w).sum(),
                                       rtol=1e-6)


def test_a_factor_of_the_loss_scales_the_gradient_by_itself(rng):
    """As MTP's 0.3 and one over the targets do, which bfloat16 does not hold."""
    x = jnp.asarray(rng.normal(size=(64, 32)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(32, 48)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 48, 64), jnp.int32)

    def gradient(factor):
        def loss(x):
            return factor * cross_entropy(x, head, targets, jnp.ones(64, jnp.float32))[0]

        return np.asarray(jax.grad(loss)(x), np.float64)

    one, part = gradient(1.0), gradient(0.3)
    length = (part * one).sum() / (one * one).sum()
    assert abs(length / 0.3 - 1) < 5e-4  # 2.6e-3 with the factor rounded to bfloat16


def test_weight_zero_means_absent():
    """Tokens of weight 0 change nothing, even when their logits overflow."""
    (x, head, targets, weights), keywords = specs.PARITY["padding"].arguments(dtype="float32")
    assert 0 < (weights == 0).sum() < len(weights)
    keep = np.flatnonzero(np.asarray(weights))
    huge = jnp.where((weights == 0)[:, None], jnp.full_like(x, 1e30), x)
    got = _results(None, (huge, head, targets, weights), keywords)
    want = _results(None, (x[keep], head, targets[keep], weights[keep]), keywords)
    assert numerics.report(got["loss"], want["loss"]) is None
    assert numerics.report(got["dhead"], want["dhead"]) is None
    assert numerics.report(got["dx"][keep], want["dx"]) is None
    assert (got["dx"][np.asarray(weights) == 0] == 0).all()


@pytest.mark.parametrize("layout", ["DV", "VD"])
def test_the_logits_of_all_tokens_are_never_held(layout):
    spec = specs.Spec(T=2048, D=16, V=512, chunk=128, head_layout=layout, dtype="bfloat16",
                      head_dtype="float32")
    (x, head, *rest), keywords = spec.arguments()

    def largest(run):
        text = run.lower(x, head).compile().as_text()
        shapes = re.findall(r"\b(?:bf16|f32|s32|pred)\[([\d,]+)\]", text)
        return max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)

    def loss(implementation):
        return lambda x, h: cross_entropy(x, h, *rest, implementation=implementation,
                                          **keywords)[0]

    assert largest(jax.jit(jax.value_and_grad(loss("xla"), (0, 1)))) <= 128 * 512
    assert largest(jax.jit(loss("xla"))) <= 128 * 512
    assert largest(jax.jit(loss("reference"))) >= 2048 * 512  # the search does see them


def test_two_runs_give_the_same_bits():
    arguments, keywords = specs.PARITY["all"].arguments(dtype="bfloat16")
    x, head, *rest = arguments
    run = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a, *rest, **keywords)[0], (0, 1)))
    for first, second in zip(*(jax.tree.leaves(run(x, head)) for _ in range(2)), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


@pytest.mark.parametrize(("change", "message"), [
    ({"x": (6, 5)}, r"x \(6, 5\) does not fit head \(4, 7\)"),
    ({"head": (4, 7, 1)}, "expected two dims"),
    ({"targets": (5,)}, r"targets_T has shape \(5,\), expected \(6,\)"),
    ({"weights": (6, 1)}, r"weights_T has shape \(6, 1\)"),
    ({"head_layout": "VxD"}, "head_layout='VxD'"),
    ({"head_layout": "VD"}, "does not fit head"),
    ({"z_loss": -0.1}, "z_loss=-0.1"),
    ({"softcap": 0}, "softcap=0"),
    ({"chunk": 0}, "chunk=0"),
])
def test_mistakes_are_named(change, message):
    shapes = {"x": (6, 4), "head": (4, 7), "targets": (6,), "weights": (6,)}
    shapes |= {n: s for n, s in change.items() if n in shapes}
    keywords = {n: s for n, s in change.items() if n not in shapes}
    x, head, targets, weights = (jnp.zeros(s) for s in shapes.values())
    with pytest.raises(ValueError, match=message):
        cross_entropy(x, head, targets.astype(jnp.int32), weights, **keywords)
