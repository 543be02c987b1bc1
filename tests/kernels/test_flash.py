"""flash: every backend, the reference too, against dense attention in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from kernels_pallas.flash import flash, op, reference, specs

FAST = [backend.name for backend in op.backends if backend.name != "reference"]


def _seen(spec, keywords):
    """The mask [B, 1, L, S] from its definition."""
    S = spec.S or spec.L
    ahead = np.arange(spec.L)[:, None] + S - spec.L - np.arange(S)
    seen = np.ones((spec.B, 1, spec.L, S), bool)
    seen &= (ahead >= 0) | (not spec.causal)
    seen &= ahead < (spec.window or S + spec.L)
    if spec.segments is not None:
        own, others = (np.asarray(keywords[n]) for n in ("segments_q", "segments_k"))
        seen &= ((own[:, :, None] == others[:, None, :]) & (own != 0)[:, :, None])[:, None]
    return seen


def _numpy(spec, arguments, keywords, cotangent):
    """Attention and its gradients by the textbook's formulas, in numpy float64."""
    q, k, v, do = (np.asarray(x, np.float64).transpose(0, 2, 1, 3)
                   for x in (*arguments, cotangent))
    group, scale, cap = spec.H // spec.K, spec.Dk**-0.5, spec.softcap
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * scale
    bent = 1.0
    if cap is not None:
        bent = 1 - np.tanh(scores / cap) ** 2
        scores = cap * np.tanh(scores / cap)
    weights = np.where(_seen(spec, keywords), np.exp(scores), 0)
    sink = np.zeros(spec.H)
    if spec.sinks:
        sink = np.exp(np.asarray(keywords["sinks_H"], np.float64))
    total = weights.sum(-1, keepdims=True) + sink[:, None, None]
    p = weights / np.where(total > 0, total, 1)
    o = p @ v
    delta = (do * o).sum(-1, keepdims=True)
    ds = p * (do @ v.swapaxes(2, 3) - delta) * bent * scale
    gradients = {"dq": ds @ k, "dk": ds.swapaxes(2, 3) @ q, "dv": p.swapaxes(2, 3) @ do}
    for name in ("dk", "dv"):  # query heads of one key head add up
        B, H, S, D = gradients[name].shape
        gradients[name] = gradients[name].reshape(B, H // group, group, S, D).sum(2)
    results = {n: x.transpose(0, 2, 1, 3) for n, x in ({"o": o} | gradients).items()}
    if spec.sinks:
        results["dsinks"] = -(delta / total).sum((0, 2, 3)) * sink
    return results


def _run(implementation, keywords, cotangent):
    """Output and gradients; weighing the output tests every element with one gradient."""
    def loss(q, k, v, sinks):
        more = {} if sinks is None else {"sinks_H": sinks}
        o = flash(q, k, v, implementation=implementation, **keywords | more)
        return (o.astype(cotangent.dtype) * cotangent).sum(), o

    sinks = keywords.get("sinks_H")
    wrt = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    graded = jax.jit(jax.value_and_grad(loss, wrt, has_aux=True))

    def run(*arguments):
        (_, o), gradients = graded(*arguments, sinks)
        return {"o": o} | dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=False))

    return run


def _cotangent(spec, dtype):
    return numerics.uniform_like(jax.ShapeDtypeStruct((spec.B, spec.L, spec.H, spec.Dv), dtype),
                                 seed=7)


def _check(backend, spec, dtype):
    arguments, keywords = spec.arguments(dtype=dtype)
    reason = op[backend].supports(*arguments, **keywords)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    cotangent = _cotangent(spec, jnp.float64 if dtype == "float64" else jnp.float32)
    got = _run(backend, keywords, cotangent)(*arguments)
    assert {x.dtype.name for x in got.values()} == {dtype}
    want = _numpy(spec, arguments, keywords, cotangent)
    assert numerics.report(got, {name: want[name] for name in got}, floor=0.1) is None


@pytest.mark.parametrize("name", specs.PARITY)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_in_float64(backend, name):
    with jax.enable_x64(True):
        _check(backend, specs.PARITY[name], "float64")


@pytest.mark.parametrize(("name", "dtype"), [("mla", "float32"), ("loop_all", "float32"),
                                             ("mla", "bfloat16"), ("all", "bfloat16")])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_rounded(backend, name, dtype):
    _check(backend, specs.PARITY[name], dtype)


@pytest.mark.parametrize("name", ["full", "all", "unseen_rows"])
def test_the_reference(name):
    with jax.enable_x64(True):
        _check("reference", specs.PARITY[name], "float64")


@pytest.mark.parametrize("blocks", [{}, {"block_q": 16, "block_k": 16}], ids=["whole", "looped"])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_the_future_the_far_past_and_other_segments_have_no_gradient(backend, blocks):
    L, window, at = 150, 40, 90
    (q, k, v), _ = specs.Spec(B=1, L=L, H=2, K=2).arguments()
    segments = jnp.asarray(np.repeat([1, 2, 0], 50), jnp.int32)[None]

    @jax.jit
    def gradients(q, k, v):
        def outputs(q, k, v):
            o = flash(q, k, v, scale=0.2, window=window, segments_q=segments,
                      implementation=backend, **blocks)
            return o[:, at].sum()
        return jax.grad(outputs, (0, 1, 2))(q, k, v)

    dq, dk, dv = (np.asarray(g)[0] for g in gradients(q, k, v))
    seen = np.arange(max(at - window + 1, 50), at + 1)  # position 90 is in the segment from 50 on
    unseen = np.setdiff1d(np.arange(L), seen)
    assert not dk[unseen].any()
    assert not dv[unseen].any()
    assert dv[seen].any(-1).all()
    assert not dq[np.arange(L) != at].any()
    assert dq[at].any()


@pytest.mark.parametrize(("L", "block"), [(256, 128), (200, 16)])
def test_blocks_past_the_diagonal_are_not_computed(L, block):
    """A nan in a key would reach every query whose block multiplies it, even by zero."""
    (q, k, v), _ = specs.Spec(B=1, L=L, H=2, K=1).arguments()
    half = L // 2 // block * block
    bad = jnp.arange(L)[None, :, None, None] >= half
    k_bad, v_bad = (jnp.where(bad, jnp.full_like(x, jnp.nan), x) for x in (k, v))
    run = jax.jit(lambda *a: flash(*a, scale=0.2, block_q=block, block_k=block,
                                   implementation="xla"))
    o = run(q, k_bad, v_bad)
    assert np.isfinite(o[:, :half]).all()
    assert np.isnan(o[:, half:]).all()


def _largest_array(compiled):
    """Return the elements of the largest array in a compiled program."""
    shapes = re.findall(r"\b(?:bf16|f32|s32|pred|u32|f16|s8|u8)\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)


@pytest.mark.parametrize("blocks", [{}, {"block_q": 64, "block_k": 64}], ids=["default", "looped"])
@pytest.mark.parametrize("segmented", [False, True])
def test_no_array_of_queries_by_keys(blocks, segmented):
    spec = specs.Spec(B=1, L=1024, H=2, K=1, Dk=16, Dv=16, dtype="bfloat16",
                      segments="packed" if segmented else None)
    arguments, keywords = spec.arguments()

    def loss(*a):
        return flash(*a, implementation="xla", **keywords | blocks).astype(jnp.float32).sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    compiled = run.lower(*arguments).compile()
    assert _largest_array(compiled) <= 1024 * 1024 / 4 + 1
    dense = jax.jit(lambda *a: reference.flash(*a, **keywords)).lower(*arguments).compile()
    assert _largest_array(dense) >= 2 * 1024 * 1024  # the search does see such arrays


def test_scores_are_not_kept_for_the_backward_pass():
    """Memory of a stack of layers grows by inputs and outputs, not by scores."""
    def temporary(layers):
        (q, k, v), keywords = specs.Spec(B=1, L=256, H=4, K=4, dtype="bfloat16").arguments()

        def loss(q):
            layer = lambda q, _: (flash(q, k, v, **keywords), None)  # noqa: E731
            return jax.lax.scan(layer, q, length=layers)[0].astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(loss)).lower(q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * 256 * 256 * 2  # in bfloat16, causal half and all
    assert (temporary(8) - temporary(4)) / 4 < scores * 0.6  # causal skips a quarter


def test_two_runs_give_the_same_bits():
    arguments, keywords = specs.PARITY["loop_all"].arguments(dtype="bfloat16")
    cotangent = _cotangent(specs.PARITY["loop_all"], jnp.float32)
    run = _run(None, keywords, cotangent)
    first, second = run(*arguments), run(*arguments)
    for name in first:
        assert np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes(), name


def test_under_vmap_remat_and_scan():
    (q, k, v), keywords = specs.Spec(B=2, L=70, block_q=16, block_k=16).arguments()

    def layer(q, _):
        return flash(q, k, v, **keywords), None

    def scanned(q):
        return jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0].sum()

    def plain(q):
        return layer(layer(q, None)[0], None)[0].sum()

    assert numerics.report(jax.jit(jax.grad(scanned))(q), jax.jit(jax.grad(plain))(q)) is None
    one = lambda *a: flash(*(x[None] for x in a), **keywords)[0]  # noqa: E731
    each = jax.jit(jax.vmap(one))(q, k, v)
    assert numerics.report(each, jax.jit(lambda *a: flash(*a, **keywords))(q, k, v)) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"k": (2, 8, 3, 4)}, "do not fit"),
    ({"v": (2, 9, 2, 4)}, "do not fit"),
    ({"q": (2, 8, 4)}, "expected four dims"),
    ({"window": 0}, "window=0"),
    ({"window": 1.5}, "window=1.5"),
    ({"softcap": 0.0}, "softcap=0.0"),
    ({"block_q": -1}, "block_q=-1"),
    ({"sinks_H": np.zeros(3, np.float32)}, r"sinks_H has shape \(3,\), expected \(4,\)"),
    ({"segments_k": np.zeros((2, 8), np.int32)}, "segments_q is not"),
    ({"segments_q": np.zeros((2, 7), np.int32)}, r"segments_q \(2, 7\)"),
    ({"implementation": "cudnn"}, "'cudnn' is unknown"),
])
def test_mistakes_are_named(change, message):
    shapes = {"q": (2, 8, 4, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 4)}
    shapes |= {n: s for n, s in change.items() if n in shapes}
    keywords = {n: s for n, s in change.items() if n not in shapes}
    with pytest.raises(ValueError, match=message):
        flash(*(jnp.zeros(s) for s in shapes.values()), scale=1.0, **keywords)
