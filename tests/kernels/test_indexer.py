"""The indexer: every backend, the reference too, against loops over queries in numpy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas import indexer
from kernels_pallas.indexer import (
    index_kl_dense,
    index_kl_listed,
    index_select,
    select,
    specs,
    xla,
)

BACKENDS = [b.name for b in indexer.op.backends if not b.name.startswith("mosaic")]
every = pytest.mark.parametrize("name", specs.PARITY)
each = pytest.mark.parametrize("backend", BACKENDS)
SCALE, MAIN_SCALE = 0.7, 0.4


def run(op, *arrays, where=None, **options):
    """The op's result in numpy, from one compiled program and not from one for each operation."""
    where = where or {}
    numbers = {name: x for name, x in where.items() if isinstance(x, int)}
    placed = {name: x for name, x in where.items() if name not in numbers}
    return np.asarray(jax.jit(functools.partial(op, **options, **numbers))(*arrays, **placed))


def visible(spec, where, b, t):
    """Numbers of the keys that query t sees."""
    ends = np.arange(spec.keys) * spec.stride + spec.span - 1
    if "ends_BxS" in where:
        ends = np.asarray(where["ends_BxS"])[b]
    seen = ends <= t
    if "segments_q" in where:
        mine = int(where["segments_q"][b, t])
        seen = seen & (np.asarray(where["segments_k"])[b] == mine) & (mine != 0)
    return np.nonzero(seen)[0]


def score(index, b, t, keys):
    q, k, w = (np.asarray(x, np.float64) for x in index)
    hits = np.maximum(k[b, keys] @ q[b, t].T, 0)
    return SCALE * hits @ w[b, t]


@each
@every
def test_it_chooses_the_best(name, backend):
    spec = specs.PARITY[name]
    index, where = spec.arguments()
    got = run(index_select, *index, where=where, top=spec.top, scale=SCALE, implementation=backend)
    assert (got.shape, got.dtype) == ((spec.B, spec.L, spec.top), jnp.int32)
    for b in range(spec.B):
        for t in range(spec.L):
            keys = visible(spec, where, b, t)
            scores = score(index, b, t, keys)
            chosen = got[b, t][got[b, t] >= 0]
            assert len(chosen) == min(spec.top, len(keys)) == len(set(chosen.tolist()))
            assert set(chosen.tolist()) <= set(keys.tolist())
            best = np.sort(scores)[::-1][: len(chosen)]
            # equal scores (0, where every head is negative) leave the numbers open here
            mine = np.sort(score(index, b, t, chosen))[::-1]
            np.testing.assert_allclose(mine, best, atol=1e-5)


@each
def test_of_equal_scores_the_lower_number_is_taken(backend):
    q, w = jnp.ones((1, 9, 2, 4)), jnp.ones((1, 9, 2))
    k = jnp.ones((1, 9, 4)).at[0, 5].set(2.0)
    got = run(index_select, q, k, w, top=3, implementation=backend)[0]
    np.testing.assert_array_equal(np.sort(got[4]), [0, 1, 2])
    np.testing.assert_array_equal(np.sort(got[8]), [0, 1, 5])
    np.testing.assert_array_equal(got[1], [0, 1, -1])


@pytest.mark.parametrize(("S", "top", "dtype"), [
    (1, 1, "float32"), (100, 7, "float32"), (256, 256, "float64"), (1000, 5, "float64"),
    (2000, 41, "float32")])
def test_the_largest_are_those_of_a_stable_sort(S, top, dtype):
    """In one and in two levels; with equal scores, both zeros, and rows of which little is seen."""
    rng = np.random.default_rng(S)
    scores = rng.normal(size=(24, S))
    scores[4:8] = np.round(scores[4:8])  # many are equal, some of them 0 and some -0
    scores[8:12] = np.abs(np.round(scores[8:12] / 3)) * np.where(scores[8:12] < 0, -0.0, 1)
    scores[12:16] += 10 * (np.arange(S) % 301 < 9)  # the best are neighbours
    scores[16:18] = 0
    scores[18] = -np.inf
    scores[19:][rng.random((5, S)) < 0.99] = -np.inf
    want = np.argsort(-(scores + 0.0), axis=-1, kind="stable")[:, :top]
    want = np.where(np.take_along_axis(scores, want, 1) > -np.inf, want, S)
    want = np.sort(want, axis=-1)
    with jax.enable_x64(dtype == "float64"):
        levels = select.levels(S, top)
        spread = select.spread(jnp.asarray(scores, dtype), 1, levels, -jnp.inf)
        got = jax.jit(select.largest, static_argnums=(1, 2))(spread, top, levels)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.where(want < S, want, -1))
    assert levels == 1 + (S > 900)


def divergence(scores, mass):
    p, e = mass / mass.sum(), np.exp(scores - scores.max())
    return (p * np.log(p / (e / e.sum()))).sum()


def of_heads(spec, main, lse, b, t, keys):
    q, k = (np.asarray(x, np.float64) for x in main)
    k = np.repeat(k, spec.H // spec.K, axis=2)
    raw = np.einsum("hd,shd->hs", q[b, t], k[b, keys]) * MAIN_SCALE
    return np.exp(raw - np.asarray(lse, np.float64)[b, t][:, None]).sum(0)


@each
@every
def test_the_divergence_over_all_visible_keys(name, backend):
    spec = specs.PARITY[name]
    index, where = spec.arguments()
    main = spec.main()
    lse = jnp.asarray(np.random.default_rng(5).normal(size=(spec.B, spec.L, spec.H)), jnp.float32)
    loss = run(index_kl_dense, *index, *main, lse, where=where, main_scale=MAIN_SCALE,
               scale=SCALE, implementation=backend)
    assert (loss.shape, loss.dtype) == ((spec.B, spec.L), jnp.float32)
    seen = 0
    for b in range(spec.B):
        for t in range(0, spec.L, 1 + spec.L // 90):
            keys, want = visible(spec, where, b, t), 0.0
            if len(keys):
                mass = of_heads(spec, main, lse, b, t, keys)
                want, seen = divergence(score(index, b, t, keys), mass), seen + 1
            np.testing.assert_allclose(loss[b, t], want, atol=2e-5)
    assert seen or name == "no_keys"


@each
@every
def test_the_divergence_over_listed_keys(name, backend):
    spec = specs.PARITY[name]
    index, where = spec.arguments()
    rng = np.random.default_rng(6)
    chosen = run(index_select, *index, where=where, top=spec.top, implementation="reference")
    chosen = np.where(rng.random(chosen.shape) < 0.2, spec.keys + 3, chosen)  # outside: no key
    listed = (chosen >= 0) & (chosen < spec.keys)
    mass = np.where(listed, rng.random(chosen.shape) + 0.1, 0).astype(np.float32)
    loss = run(index_kl_listed, *index, chosen, mass, scale=SCALE, implementation=backend)
    for b in range(spec.B):
        for t in range(0, spec.L, 1 + spec.L // 90):
            keys, want = chosen[b, t][listed[b, t]], 0.0
            if len(keys):
                want = divergence(score(index, b, t, keys), mass[b, t][listed[b, t]])
            np.testing.assert_allclose(loss[b, t], want, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "late", "documents"])
def test_gradients_are_differences(name):
    spec = specs.PARITY[name]
    with jax.enable_x64(True):
        index, where = spec.arguments(dtype="float64")
        main = spec.main(dtype="float64")
        rng = np.random.default_rng(7)
        lse = jnp.asarray(rng.normal(size=(spec.B, spec.L, spec.H)))
        weigh = jnp.asarray(rng.normal(size=(spec.B, spec.L)))
        chosen = run(index_select, *index, where=where, top=spec.top)
        mass = np.where(chosen >= 0, rng.random(chosen.shape), 0)

        def by_all(*index):
            loss = index_kl_dense(*index, *main, lse, main_scale=MAIN_SCALE, **where)
            return (weigh * loss).sum()

        def by_listed(*index):
            return (weigh * index_kl_listed(*index, chosen, mass)).sum()

        for loss in (by_all, by_listed):
            check_grads(jax.jit(loss), index, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["parts", "compressed"])
def test_gradients_equal_the_references_in_bfloat16(name):
    spec = specs.PARITY[name]
    index, where = spec.arguments(dtype="bfloat16")
    main = spec.main(dtype="bfloat16")
    lse = jnp.full((spec.B, spec.L, spec.H), 2.0)
    chosen = run(index_select, *index, where=where, top=spec.top)
    mass = np.where(chosen >= 0, 1 + np.arange(spec.top), 0).astype(np.float32)

    def both(implementation, index, main):
        dense = index_kl_dense(*index, *main, lse, main_scale=MAIN_SCALE, **where,
                               implementation=implementation)
        listed = index_kl_listed(*index, chosen, mass, implementation=implementation)
        return dense.mean() + listed.mean()

    got, want = (jax.jit(jax.grad(lambda *a, n=n: both(n, *a), (0, 1)))(index, main)
                 for n in ("xla", "reference"))
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
        assert a.dtype == jnp.bfloat16
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()
    assert not any(np.asarray(x, np.float32).any() for x in jax.tree.leaves(got[1]))


def test_no_gradient_flows_through_the_target():
    spec = specs.PARITY["plain"]
    index, where = spec.arguments()
    lse, chosen = jnp.ones((spec.B, spec.L, spec.H)), run(index_select, *index, top=3)

    def loss(main, lse, mass):
        dense = index_kl_dense(*index, *main, lse, main_scale=1.0, **where)
        return dense.sum() + index_kl_listed(*index, chosen, mass).sum()

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(spec.main(), lse, jnp.ones(chosen.shape))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(found))


def test_memory_is_linear_in_length():
    L = 8192
    spec = specs.Spec(B=1, L=L, J=2, D=16, H=2, K=1, Dk=16, top=64, dtype="bfloat16")
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16)
              for s in ((1, L, 2, 16), (1, L, 16), (1, L, 2), (1, L, 2, 16), (1, L, 1, 16))]
    lse = jax.ShapeDtypeStruct((1, L, 2), jnp.float32)

    def loss(q, k, w, main_q, main_k, lse):
        chosen = index_select(q, k, w, top=spec.top)
        mass = jnp.where(chosen >= 0, 1.0, 0.0)
        dense = index_kl_dense(q, k, w, main_q, main_k, lse, main_scale=1.0)
        return dense.sum() + index_kl_listed(q, k, w, chosen, mass).sum()

    held = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, lse).compile().memory_analysis()
    assert held.temp_size_in_bytes < L * L * 4 / 2


def test_two_runs_give_the_same_bits():
    index, where = specs.PARITY["parts"].arguments(dtype="bfloat16")
    chosen = run(index_select, *index, where=where, top=9)

    @jax.jit
    def gradient(*index):
        return jax.grad(lambda *a: index_kl_listed(*a, chosen, jnp.ones(chosen.shape)).sum(),
                        (0, 1, 2))(*index)

    for a, b in zip(gradient(*index), gradient(*index), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_the_formula_counts_what_is_scored():
    assert xla.keys_per_query(0) == 0.0
    assert xla.keys_per_query(100) == 100
    assert xla.keys_per_query(4096) == 4096 * (1 + 2 + 3 + 4) / 16
    assert xla.keys_per_query(4096, keys=1024, stride=4, span=4) == 1024 * (1 + 2 + 3 + 4) / 16


@pytest.mark.parametrize(("changes", "words"), [
    ({"q": (1, 4, 2, 7)}, "do not fit"),
    ({"w": (1, 4, 3)}, "w has shape"),
    ({"top": 0}, "top=0"),
    ({"stride": 0}, "stride=0"),
    ({"segments": (1, 5)}, "segments_q"),
])
def test_what_does_not_fit_is_refused(changes, words):
    shapes = {"q": (1, 4, 2, 8), "k": (1, 4, 8), "w": (1, 4, 2)} | changes
    arrays = [jnp.zeros(shapes[n]) for n in ("q", "k", "w")]
    more = {"top": changes.get("top", 2), "stride": changes.get("stride", 1)}
    if "segments" in changes:
        more["segments_q"] = jnp.ones(changes["segments"], jnp.int32)
    with pytest.raises(ValueError, match=words):
        index_select(*arrays, **more)
