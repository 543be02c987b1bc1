"""token_sparse: every backend against a loop over queries in numpy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics, rows
from kernels_pallas.token_sparse import op, specs, token_mass, token_sparse

FAST = [backend.name for backend in op.backends
        if backend.name != "reference" and not backend.name.startswith("mosaic")]


def _numpy(spec, arguments, cotangents):
    """Output, gradients and masses, one query, head and list at a time."""
    q, kv, chosen = (np.asarray(x, np.float64 if i < 2 else int) for i, x in enumerate(arguments))
    do, d_lse = (np.asarray(x, np.float64) for x in cotangents)
    if not spec.lse:
        d_lse = np.zeros_like(d_lse)
    S, scale = kv.shape[1], spec.Dk**-0.5
    o, lse = np.zeros_like(do), np.full(d_lse.shape, -1e30)
    dq, dkv, mass = np.zeros_like(q), np.zeros_like(kv), np.zeros(chosen.shape)
    for b, i, h in np.ndindex(lse.shape):
        tokens = sorted({t for t in chosen[b, i].tolist() if 0 <= t < S})
        if not tokens:
            continue
        keys = kv[b, tokens]
        weights = np.exp(keys @ q[b, i, h] * scale)
        lse[b, i, h] = np.log(weights.sum())
        p = weights / weights.sum()
        o[b, i, h] = p @ keys[:, :spec.v_dim]
        d_p = keys[:, :spec.v_dim] @ do[b, i, h]
        d_s = p * (d_p - do[b, i, h] @ o[b, i, h] + d_lse[b, i, h]) * scale
        dq[b, i, h] = d_s @ keys
        dkv[b, tokens] += np.outer(d_s, q[b, i, h])
        dkv[b, tokens, :spec.v_dim] += np.outer(p, do[b, i, h])
        for n, t in enumerate(chosen[b, i].tolist()):
            mass[b, i, n] += p[tokens.index(t)] if t in tokens else 0
    return {"o": o, "lse": lse, "dq": dq, "dkv": dkv, "mass": mass}


def _run(implementation, arguments, keywords, cotangents):
    """Output and gradients; weighing the output tests every element with one gradient."""
    keywords = keywords | {"return_lse": True, "implementation": implementation}
    q, kv, chosen = arguments
    weights = cotangents if keywords.pop("lse_graded") else (cotangents[0],)

    @jax.jit
    def run(q, kv):
        def loss(q, kv):
            out = token_sparse(q, kv, chosen, **keywords)
            seen = [x > -1e29 for x in out]  # -1e30 would round all else away
            parts = [jnp.where(s, x.astype(c.dtype) * c, jnp.zeros_like(c)).sum()
                     for s, x, c in zip(seen, out, weights, strict=False)]
            return sum(parts), out

        (_, (o, lse)), (dq, dkv) = jax.value_and_grad(loss, (0, 1), has_aux=True)(q, kv)
        mass = token_mass(q, kv, chosen, lse, scale=keywords["scale"],
                          implementation=implementation)
        return {"o": o, "lse": lse, "dq": dq, "dkv": dkv, "mass": mass}

    return run(q, kv)


def _check(backend, spec, dtype):
    arguments, keywords = spec.arguments(dtype=dtype)
    (B, L, H, _), wide = arguments[0].shape, "float64" if dtype == "float64" else "float32"
    sizes = [jax.ShapeDtypeStruct(s, jnp.dtype(wide)) for s in ((B, L, H, spec.v_dim), (B, L, H))]
    cotangents = numerics.uniform_like(sizes, seed=7)
    got = _run(backend, arguments, keywords | {"lse_graded": spec.lse}, cotangents)
    want = _numpy(spec, arguments, cotangents)
    assert {name: x.dtype.name for name, x in got.items()} == {
        "o": dtype, "dq": dtype, "dkv": dtype, "lse": wide, "mass": wide}
    unseen = want["lse"] < -1e29
    np.testing.assert_allclose(np.asarray(got["lse"])[unseen], -1e30, rtol=1e-6)
    for results in (got, want):
        results["lse"] = jnp.where(unseen, 0, np.asarray(results["lse"]))
    assert numerics.report(got, {name: want[name] for name in got}, dtype=dtype,
                           floor=0.1) is None


@pytest.mark.parametrize("name", specs.PARITY)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_in_float64(backend, name):
    with jax.enable_x64(True):
        _check(backend, specs.PARITY[name], "float64")


@pytest.mark.parametrize("name", ["latent", "any", "one", "no_tokens"])
def test_the_reference(name):
    with jax.enable_x64(True):
        _check("reference", specs.PARITY[name], "float64")


@pytest.mark.parametrize(("name", "dtype"), [("latent", "float32"), ("any", "bfloat16"),
                                             ("chunks", "bfloat16")])
def test_values_and_gradients_rounded(name, dtype):
    _check("xla", specs.PARITY[name], dtype)


def test_without_the_log_sum_exp_the_output_is_the_same():
    arguments, keywords = specs.PARITY["plain"].arguments()
    alone = token_sparse(*arguments, **keywords | {"return_lse": False})
    o, lse = token_sparse(*arguments, **keywords | {"return_lse": True})
    assert np.asarray(alone).tobytes() == np.asarray(o).tobytes()
    assert lse.shape == o.shape[:3]


def test_only_what_is_listed_has_a_gradient():
    (q, kv, chosen), keywords = specs.Spec(B=2, L=40, N=4).arguments()
    at = 23

    @jax.jit
    def gradients(q, kv):
        return jax.grad(lambda *a: token_sparse(*a, chosen, **keywords)[1, at].sum(), (0, 1))(q, kv)

    dq, dkv = (np.asarray(g) for g in gradients(q, kv))
    listed = np.zeros((2, 40), bool)
    listed[1, np.asarray(chosen)[1, at]] = True
    np.testing.assert_array_equal(dkv.any(-1), listed)
    assert dq[1, at].any()
    assert not np.delete(dq[1], at, 0).any()
    assert not dq[0].any()


def test_the_mass_has_no_gradient():
    (q, kv, chosen), keywords = specs.PARITY["latent"].arguments()
    lse = token_sparse(q, kv, chosen, **keywords)[1]
    of = lambda *a: token_mass(a[0], a[1], chosen, a[2], scale=0.3).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(of, (0, 1, 2))(q, kv, lse)
    assert value > 0
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_rows_are_taken_and_put_back(dtype):
    B, L, N, S, D = 2, 9, 4, 7, 5
    with jax.enable_x64(dtype == "float64"):
        chosen = np.random.default_rng(0).integers(-2, S + 2, (B, L, N))
        lists = jnp.asarray(chosen, jnp.int32)
        x = numerics.normal((B, S, D), jnp.dtype(dtype), seed=1)
        d = numerics.normal((B, L, N, D), jnp.dtype(dtype), seed=2)
        taken, put = np.zeros((B, L, N, D)), np.zeros((B, S, D))
        for b, i, n in np.ndindex(chosen.shape):
            if 0 <= chosen[b, i, n] < S:
                taken[b, i, n] = np.asarray(x, np.float64)[b, chosen[b, i, n]]
                put[b, chosen[b, i, n]] += np.asarray(d, np.float64)[b, i, n]
        got, back = jax.vjp(lambda x: rows.take(x, lists), x)
        np.testing.assert_array_equal(np.asarray(got, np.float64), taken)
        total = rows.put(d, lists, S)
        assert total.dtype == ("float64" if dtype == "float64" else "float32")
        assert numerics.report(total, put) is None
        assert numerics.report(back(d)[0], put) is None


def test_memory_is_linear_in_the_queries():
    def temporary(L, implementation=None):
        spec = dataclasses.replace(specs.SPEED["dsa_4k"], L=L)
        sizes = ((1, L, spec.H, spec.Dk), (1, L, spec.Dk), (1, L, spec.N))
        arguments = [jax.ShapeDtypeStruct(s, t) for s, t in
                     zip(sizes, (jnp.bfloat16, jnp.bfloat16, jnp.int32), strict=True)]
        keywords = {"v_dim": spec.v_dim, "scale": 0.1}
        loss = lambda q, kv, c: token_sparse(  # noqa: E731
            q, kv, c, implementation=implementation, **keywords).astype(jnp.float32).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    L = 8192
    assert temporary(L) < L * L * 4 / 2
    assert temporary(L, "reference") > L * L * 4  # dense attention would show


def test_two_runs_give_the_same_bits():
    spec = specs.PARITY["chunks"]
    arguments, keywords = spec.arguments(dtype="bfloat16")
    graded = jax.jit(jax.value_and_grad(
        lambda q, kv: token_sparse(q, kv, arguments[2], **keywords)[0].astype(jnp.float32).sum(),
        (0, 1)))
    first, second = (jax.tree.leaves(graded(*arguments[:2])) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_under_vmap_remat_and_scan():
    (q, kv, chosen), keywords = specs.Spec(L=30).arguments()

    def layer(q, _):
        return token_sparse(q, kv, chosen, **keywords), None

    def scanned(q):
        return jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0].sum()

    def plain(q):
        return layer(layer(q, None)[0], None)[0].sum()

    assert numerics.report(jax.jit(jax.grad(scanned))(q), jax.jit(jax.grad(plain))(q)) is None
    one = lambda *a: token_sparse(*(x[None] for x in a), **keywords)[0]  # noqa: E731
    each = jax.jit(jax.vmap(one))(q, kv, chosen)
    assert numerics.report(each, jax.jit(lambda *a: token_sparse(*a, **keywords))(
        q, kv, chosen)) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"q": (2, 8, 4)}, r"q has shape \(2, 8, 4\), expected 4 dims"),
    ({"kv": (2, 9, 5)}, "do not fit"),
    ({"kv": (3, 9, 6)}, "do not fit"),
    ({"chosen": (2, 7, 3)}, r"chosen \(2, 7, 3\) does not fit"),
    ({"v_dim": 7}, "v_dim=7 must be a whole number from 1 to 6"),
    ({"v_dim": 0}, "v_dim=0"),
    ({"dtype": jnp.bfloat16}, "q is bfloat16 and kv is float32"),
    ({"listed": jnp.float32}, "chosen is float32"),
    ({"implementation": "cudnn"}, "'cudnn' is unknown"),
])
def test_mistakes_are_named(change, message):
    shapes = {"q": (2, 8, 4, 6), "kv": (2, 9, 6), "chosen": (2, 8, 3)}
    change = dict(change)
    dtypes = {"q": change.pop("dtype", jnp.float32), "kv": jnp.float32,
              "chosen": change.pop("listed", jnp.int32)}
    shapes |= {n: s for n, s in change.items() if n in shapes}
    keywords = {"v_dim": 6} | {n: s for n, s in change.items() if n not in shapes}
    with pytest.raises(ValueError, match=message):
        token_sparse(*(jnp.zeros(s, dtypes[n]) for n, s in shapes.items()), scale=1.0, **keywords)


def test_a_mass_of_other_queries_is_refused():
    arguments, _ = specs.PARITY["plain"].arguments()
    with pytest.raises(ValueError, match=r"lse \(2, 24, 3\) does not fit q \(2, 24, 4, 16\)"):
        token_mass(*arguments, jnp.zeros((2, 24, 3)), scale=1.0)
