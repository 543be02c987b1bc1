"""flash: every backend, the reference too, against dense attention in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas import numerics
from kernels_pallas.flash import flash, op, pairs, reference, specs
from kernels_pallas.flash.xla import keys_per_query

PEERS = ("cudnn", "splash", "tokamax")  # test_peers.py, test_tokamax.py
FAST = [backend.name for backend in op.backends  # those of chips have tests of their own
        if backend.name not in ("reference", "mosaic_gpu", "mosaic_tpu", *PEERS)]


def _seen(spec, keywords):
    """The mask [B, 1, L, S] from its definition."""
    S = spec.S or spec.L
    behind = np.arange(spec.L)[:, None] + S - spec.L - np.arange(S)
    if (spec.stride, spec.span) != (1, 1):
        behind = np.arange(spec.L)[:, None] - (np.arange(S) * spec.stride + spec.span - 1)
    behind = behind[None, None]
    if spec.ends:
        behind = (np.arange(spec.L)[:, None] - np.asarray(keywords["ends_BxS"])[:, None])[:, None]
    seen = np.ones((spec.B, 1, spec.L, S), bool)
    seen &= (behind >= 0) | (not spec.causal)
    seen &= behind < (spec.window or S + spec.L)
    if spec.segments is not None:
        own, others = (np.asarray(keywords[n]) for n in ("segments_q", "segments_k"))
        seen &= ((own[:, :, None] == others[:, None, :]) & (own != 0)[:, :, None])[:, None]
    return seen


def _numpy(spec, arguments, keywords, cotangents):
    """Attention and its gradients by the textbook's formulas, in numpy float64."""
    q, k, v, do = (np.asarray(x, np.float64).transpose(0, 2, 1, 3)
                   for x in (*arguments, cotangents[0]))
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
    if spec.lse:
        delta -= np.asarray(cotangents[1], np.float64).transpose(0, 2, 1)[..., None]
    ds = p * (do @ v.swapaxes(2, 3) - delta) * bent * scale
    gradients = {"dq": ds @ k, "dk": ds.swapaxes(2, 3) @ q, "dv": p.swapaxes(2, 3) @ do}
    for name in ("dk", "dv"):  # query heads of one key head add up
        B, H, S, D = gradients[name].shape
        gradients[name] = gradients[name].reshape(B, H // group, group, S, D).sum(2)
    results = {n: x.transpose(0, 2, 1, 3) for n, x in ({"o": o} | gradients).items()}
    if spec.sinks:
        results["dsinks"] = -(delta / total).sum((0, 2, 3)) * sink
    if spec.lse:
        lse = np.where(total > 0, np.log(np.where(total > 0, total, 1)), -1e30)
        results["lse"] = lse[..., 0].transpose(0, 2, 1)
    return results


def _run(implementation, keywords, cotangents):
    """Output and gradients; weighing the output tests every element with one gradient."""
    def loss(q, k, v, sinks):
        more = {} if sinks is None else {"sinks_H": sinks}
        out = flash(q, k, v, implementation=implementation, **keywords | more)
        out = out if isinstance(out, tuple) else (out,)
        unseen = [x < -1e29 for x in out]  # -1e30 would round all else away
        parts = [jnp.where(u, jnp.zeros_like(c), x.astype(c.dtype) * c).sum()
                 for u, x, c in zip(unseen, out, cotangents, strict=False)]
        return sum(parts), out

    sinks = keywords.get("sinks_H")
    wrt = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    graded = jax.jit(jax.value_and_grad(loss, wrt, has_aux=True))

    def run(*arguments):
        (_, out), gradients = graded(*arguments, sinks)
        return (dict(zip(("o", "lse"), out, strict=False))
                | dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=False)))

    return run


def _cotangents(spec, dtype):
    """Of the output, and of its log-sum-exp."""
    sizes = ((spec.B, spec.L, spec.H, spec.Dv), (spec.B, spec.L, spec.H))
    return numerics.uniform_like([jax.ShapeDtypeStruct(s, dtype) for s in sizes], seed=7)


def _check(backend, spec, dtype):
    arguments, keywords = spec.arguments(dtype=dtype)
    reason = op[backend].supports(*arguments, **keywords)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    cotangents = _cotangents(spec, jnp.float64 if dtype == "float64" else jnp.float32)
    got = _run(backend, keywords, cotangents)(*arguments)
    want = _numpy(spec, arguments, keywords, cotangents)
    assert set(got) == set(want)
    if spec.lse:
        got["lse"], want["lse"], unseen = np.asarray(got["lse"]), want["lse"], want["lse"] < -1e29
        assert got["lse"].dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(got["lse"][unseen], -1e30, rtol=1e-6)
        np.testing.assert_array_equal(got["lse"] < -1e29, unseen)
        got["lse"], want["lse"] = (jnp.asarray(np.where(unseen, 0, x)[..., None]) for x in
                                   (got["lse"].astype(dtype), want["lse"]))
    assert {x.dtype.name for x in got.values()} == {dtype}
    assert numerics.report(got, {name: want[name] for name in got}, floor=0.1) is None


# What only one feature asks for is asked for by others along with more.
ALONE = ("sinks", "softcap", "padded", "window_full", "loop", "loop_one", "loop_full",
         "loop_unseen", "loop_padded", "loop_lse", "loop_strided")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in ALONE else name for name in specs.PARITY])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_in_float64(backend, name):
    with jax.enable_x64(True):
        _check(backend, specs.PARITY[name], "float64")


@pytest.mark.parametrize(("name", "dtype"), [("mla", "float32"), ("loop_all", "float32"),
                                             ("mla", "bfloat16"), ("all", "bfloat16"),
                                             ("loop_packed", "float32"),
                                             ("strided_packed", "bfloat16")])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_rounded(backend, name, dtype):
    _check(backend, specs.PARITY[name], dtype)


@pytest.mark.parametrize("name", ["full", "all", "unseen_rows", "strided_packed",
                                  "loop_ends_window"])
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
    k_bad, v_bad = (np.array(x) for x in (k, v))
    k_bad[:, half:] = v_bad[:, half:] = np.nan
    run = jax.jit(lambda *a: flash(*a, scale=0.2, block_q=block, block_k=block,
                                   implementation="xla"))
    o = np.asarray(run(q, k_bad, v_bad))
    assert np.isfinite(o[:, :half]).all()
    assert np.isnan(o[:, half:]).all()


@pytest.mark.parametrize(("length", "settings"), [
    (300, {}), (2700, {}), (300, {"window": 90}), (2700, {"window": 90}),
    (2700, {"keys": 675, "stride": 4, "span": 8}),
    (1300, {"keys": 325, "stride": 4, "window": 400}),
    (300, {"keys": 2, "stride": 128, "span": 128}),
])
def test_the_keys_counted_are_the_keys_multiplied(length, settings, monkeypatch):
    done = {"add_pair": 0, "pair_gradients": 0}

    def count(name, keys_at):
        original = getattr(pairs, name)

        def counted(plan, q, *rest):
            def add():
                done[name] += q.shape[-2] * rest[keys_at].shape[1]
            jax.debug.callback(add)
            return original(plan, q, *rest)

        monkeypatch.setattr(pairs, name, counted)

    count("add_pair", 0)
    count("pair_gradients", 1)
    settings = dict(settings)
    spec = specs.Spec(B=1, L=length, S=settings.pop("keys", None), H=1, K=1, Dk=4, Dv=4)
    arguments, _ = spec.arguments()
    gradient = jax.grad(lambda *a: flash(*a, scale=1.0, **settings).sum())
    jax.block_until_ready(jax.jit(gradient)(*arguments))
    jax.effects_barrier()
    counted = keys_per_query(length, keys=spec.S, **settings)
    assert done == {n: pytest.approx(counted * length) for n in done}
    seen = int(reference.visible(length, spec.S or length, **settings).sum())
    assert counted * length >= seen > 0


def test_the_work_of_a_window_grows_linearly():
    for window, limit in ((128, 512), (512, 1024), (2048, 3072)):
        assert keys_per_query(2**15, window=window) <= limit
        assert keys_per_query(2**17, window=window) <= limit
    assert keys_per_query(2**17) > 2**16


@pytest.mark.parametrize("blocks", [{}, {"block_q": 4, "block_k": 4}], ids=["whole", "looped"])
def test_gradients_through_the_log_sum_exp_by_finite_differences(blocks):
    spec = specs.Spec(B=1, L=19, S=9, H=2, K=1, Dk=4, Dv=3, stride=2, span=2, lse=True, sinks=True)
    with jax.enable_x64(True):
        arguments, keywords = spec.arguments(dtype="float64")

        def run(q, k, v, sinks):
            return flash(q, k, v, **keywords | blocks | {"sinks_H": sinks})

        check_grads(jax.jit(run), (*arguments, keywords["sinks_H"]), order=1, modes=["rev"])


def test_parts_of_one_softmax_merge_through_their_log_sum_exp():
    """The window and what lies before it, apart and together: values and gradients."""
    (q, k, v), keywords = specs.Spec(B=1, L=48, H=2, K=1).arguments(dtype="float32")
    scale, block = keywords["scale"], 8
    place = jnp.arange(48, dtype=jnp.int32)[None]
    blocks = place // block + 1

    def whole(q, k, v):
        return flash(q, k, v, scale=scale)

    def merged(q, k, v):
        near = flash(q, k, v, scale=scale, segments_q=blocks, return_lse=True)
        # a key that stands at its block's last row is seen from the next block on
        past = flash(q, k, v, scale=scale, ends_BxS=(place // block + 1) * block, return_lse=True)
        lse = jnp.stack([near[1], past[1]])
        shares = jax.nn.softmax(lse, axis=0)[..., None]
        return shares[0] * near[0] + shares[1] * past[0]

    def graded(f):
        loss = lambda *a: (f(*a) * jnp.cos(q)).sum()  # noqa: E731
        return jax.jit(lambda *a: (f(*a), jax.grad(loss, (0, 1, 2))(*a)))(q, k, v)

    assert numerics.report(graded(merged), graded(whole)) is None


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
    run = _run(None, keywords, _cotangents(specs.PARITY["loop_all"], jnp.float32))
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
    ({"stride": 0}, "stride=0"),
    ({"span": 2.5}, "span=2.5"),
    ({"ends_BxS": np.zeros((2, 7), np.int32)}, r"ends_BxS has shape \(2, 7\), expected \(2, 8\)"),
    ({"implementation": "triton"}, "'triton' is unknown"),
])
def test_mistakes_are_named(change, message):
    shapes = {"q": (2, 8, 4, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 4)}
    shapes |= {n: s for n, s in change.items() if n in shapes}
    keywords = {n: s for n, s in change.items() if n not in shapes}
    with pytest.raises(ValueError, match=message):
        flash(*(jnp.zeros(s) for s in shapes.values()), scale=1.0, **keywords)
