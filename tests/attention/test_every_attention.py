"""The laws every attention variant keeps; a new row of the table is picked up by itself.

A variant computes attention through an op of `sharding.ops`. The mask law puts a dense float64
attention in the place of that op, which knows nothing but the variant's own `mask`, and demands
the same values and gradients.
"""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base
from sparse_pretrain.sharding import ops

WIDTH, LENGTH = 48, 40

COMPRESSED = {"q_rank": 12, "dim": 16, "rope_dim": 8, "window": 6, "group_rank": 10}
LATENT = {"heads": 2, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "v_dim": 12}
INDEX = {"index_heads": 3, "index_dim": 8, "index_rope_dim": 4}
NATIVE = {"span": 4, "stride": 2, "block": 4, "top_k": 3, "window": 5}

# Settings of a variant beyond its defaults; a variant that is not named here is tested at those.
SETTINGS = {
    "full": {
        "default": {"heads": 4},
        "grouped": {"heads": 4, "kv_heads": 2, "head_dim": 16, "softcap": 5.0},
        "bare": {"heads": 3, "kv_heads": 1, "qk_norm": False},
        "joint norm": {"heads": 4, "kv_heads": 2, "qk_norm_joint": True},
    },
    "mla": {
        "default": {"heads": 2, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "v_dim": 12},
        "latent queries": {"heads": 3, "q_rank": 12, "kv_rank": 8, "softcap": 5.0},
        "yarn": {"heads": 2, "rope": {"interleaved": True, "factor": 4.0, "original": 16}},
    },
    "sliding": {
        "default": {"heads": 4, "window": 7},
        "grouped": {"heads": 4, "kv_heads": 2, "window": 64, "sinks": False, "softcap": 5.0},
        "two": {"heads": 3, "kv_heads": 1, "window": 2},
    },
    "moba": {
        "default": {"heads": 4, "block": 6, "top_k": 2},
        "grouped": {"heads": 4, "kv_heads": 2, "block": 5, "top_k": 3, "qk_norm": False},
        "all": {"heads": 2, "block": 4, "top_k": 9},
        "full": {"heads": 2, "block": 4, "top_k": 10},
        "own": {"heads": 2, "kv_heads": 1, "block": 9, "top_k": 1},
    },
    "dsa": {
        "default": LATENT | INDEX | {"top": 7},
        "latent queries": LATENT | INDEX | {"q_rank": 12, "top": 3, "index_rope_dim": 0},
        "all": LATENT | INDEX | {"top": 64},
        "warmup": LATENT | INDEX | {"top": 4, "mode": "warmup"},
        "dense": LATENT | INDEX | {"top": 4, "mode": "dense"},
    },
    "csa": {
        "default": COMPRESSED | INDEX | {"ratio": 4, "top": 3},
        "all": COMPRESSED | INDEX | {"ratio": 2, "top": 50},
        "warmup": COMPRESSED | INDEX | {"ratio": 4, "top": 3, "mode": "warmup"},
        "dense": COMPRESSED | INDEX | {"ratio": 4, "top": 3, "mode": "dense"},
    },
    "nsa": {
        "default": NATIVE | {"heads": 4, "kv_heads": 2, "top_k": 4},
        "wide": NATIVE | {"heads": 3, "kv_heads": 1, "span": 8, "block": 2, "local": 1,
                          "window": 9, "hidden": 5, "qk_norm": False},
        "all": NATIVE | {"heads": 2, "span": 2, "block": 2, "top_k": 30, "local": 1, "window": 64},
    },
    "hca": {
        "default": COMPRESSED | {"ratio": 8},
        "flat": COMPRESSED | {"ratio": 2, "rope_dim": 0, "groups": 4, "window": 50},
    },
}
# Up to six compilations of seconds each, of settings that other cases mostly hold too.
SLOW = (
    "nsa-wide", "moba-full", "csa-dense", "dsa-dense", "full-bare", "full-joint norm", "mla-yarn",
    "sliding-two", "moba-own", "hca-flat", "nsa-all", "csa-all",
)  # fmt: skip
CASES = [
    pytest.param(
        kind, changes, id=f"{kind}-{name}",
        marks=[pytest.mark.slow] if f"{kind}-{name}" in SLOW else [],
    )
    for kind in attention.TABLE
    for name, changes in SETTINGS.get(kind, {"default": {}}).items()
]
every = pytest.mark.parametrize(("kind", "changes"), CASES)
# A mask's own laws at every setting are the slow tests': by default the other settings are held to
# dense attention under that mask, and to decoding.
defaults = pytest.mark.parametrize(
    ("kind", "changes"),
    [
        case if "-default" in case.id
        else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in CASES
    ],
)  # fmt: skip
# Attention to compressed keys is no attention to tokens under a mask, and DSA's mask is its
# indexer's choice: test_csa_oracle and test_dsa_oracle have their laws.
OWN_ORACLE = ("csa", "hca", "dsa")
LAW = [
    pytest.param(
        *case.values, dtype, id=f"{case.id}-{dtype}",
        marks=[pytest.mark.slow] if (case.values[0], dtype) == ("nsa", "bfloat16") else case.marks,
    )
    for case in CASES
    for dtype in ("float64", "bfloat16")
    if case.values[0] not in OWN_ORACLE and (dtype == "float64" or "default" in case.id)
]
# float64 by the order of sums; bfloat16 by the op's tolerance, as the layers around it round alike
WITHIN = {"float64": 1e-9, "bfloat16": numerics.tolerance("bfloat16")}


def made(kind, changes):
    """(class, config, definition, parameters of which none sits at its initial value)."""
    return _made(attention.TABLE[kind], json.dumps(changes))


@functools.cache
def _made(variant, changes):
    config = spec.build(variant.Config, json.loads(changes))
    definition = nn.define(lambda keys: variant(config, WIDTH, keys))
    params, prices = definition.init(jax.random.key(0))
    assert not jax.tree.leaves(prices)
    leaves, tree = jax.tree.flatten(params)
    noise = [0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    params = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    return variant, config, definition, params


def forward(definition, params, x, context):
    return definition.merge(params, {})(x, context)


@functools.cache
def compiled(definition):
    """`forward` of a definition, compiled once for each shape and type."""
    return jax.jit(functools.partial(forward, definition))


def inputs(rng, rows=2, length=LENGTH):
    """x and the context of rows that hold several documents, the last one padding at its end."""
    x = jnp.asarray(rng.normal(size=(rows, length, WIDTH)), jnp.float32)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(3, length - 8), 2, replace=False))
        edges = [0, *cuts.tolist(), length - 5 if row == rows - 1 else length]
        for n, (start, end) in enumerate(itertools.pairwise(edges)):
            segments[row, start:end] = n + 1
            positions[row, start:end] = np.arange(end - start)
    return x, base.Context(jnp.asarray(segments), jnp.asarray(positions))


def one_document(rows, length):
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    return base.Context(jnp.ones((rows, length), jnp.int32), positions)


def dense(mask, calls):
    """An op like flash that attends densely, in float64, where `mask` [B, L, L] allows."""

    def attend(q, k, v, *, scale, softcap=None, sinks_H=None, return_lse=False, **ignored):
        calls.append(sorted(ignored))
        wide = [a.astype(jnp.float64) for a in (q, k, v)]
        q64, k64, v64 = (jnp.moveaxis(a, 2, 1) for a in wide)
        share = q64.shape[1] // k64.shape[1]
        k64, v64 = (jnp.repeat(a, share, axis=1) for a in (k64, v64))
        score = jnp.matmul(q64, jnp.swapaxes(k64, 2, 3)) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        seen = jnp.broadcast_to(mask if mask.ndim == 4 else mask[:, None], score.shape)
        none = ~jnp.any(seen, axis=-1, keepdims=True)
        score = jnp.where(seen | none, score, -jnp.inf)
        if sinks_H is not None:
            sink = jnp.broadcast_to(
                sinks_H.astype(jnp.float64)[None, :, None, None], (*score.shape[:3], 1)
            )
            score = jnp.concatenate([score, sink], axis=-1)
        weight = jax.nn.softmax(score, axis=-1)[..., : k64.shape[2]]
        weight = jnp.where(none, 0.0, weight)
        o = jnp.moveaxis(jnp.matmul(weight, v64), 1, 2).astype(v.dtype)
        # a dense choice of keys needs no denominator
        return (o, None) if return_lse else o

    return attend


def densely(seen, calls):
    """A branch's core that attends densely where the branch's own mask allows."""

    def core(self, q, k, v, *where, **flags):
        return dense(seen(self, q, k, *where), calls)(q, k, v, scale=self._scale, **flags)

    return core


def close(got, want, atol=2e-5):
    """Equal to float32 rounding, relative to the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(t, np.result_type(t.dtype, np.float32)) for t in (a, b))
        scale = max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "changes", "dtype"), LAW)
def test_it_equals_dense_attention_under_its_own_mask(kind, changes, dtype, rng, monkeypatch):
    variant, config, definition, params = made(kind, changes)
    x, context = inputs(rng)
    cotangent = rng.normal(size=x.shape)

    def value_and_gradients():
        def run(params, x):
            y, pull = jax.vjp(lambda p, x: forward(definition, p, x, context), params, x)
            return y, pull(jnp.asarray(cotangent, dtype))

        return jax.jit(run)(*jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, x)))

    with jax.enable_x64(True):
        ours = value_and_gradients()
        mask = variant.mask(config, context)
        assert mask.shape == (*x.shape[:2], x.shape[1])
        # it chooses by what it reads, or has branches: each states its mask
        cores = getattr(variant, "CORES", {"core": "seen"} if hasattr(variant, "seen") else {})
        calls = {core: [] for core in cores or ("flash",)}
        for core, seen in cores.items():
            monkeypatch.setattr(variant, core, densely(getattr(variant, seen), calls[core]))
        if not cores:
            monkeypatch.setattr(ops, "flash", dense(mask, calls["flash"]))
        oracle = value_and_gradients()
    assert all(calls.values()), f"{kind} attends through no op that this law replaces: {calls}"
    assert all(a.dtype == dtype for a in jax.tree.leaves((ours, oracle)))
    close(ours, oracle, atol=WITHIN[dtype])
    # the law is empty where the gradient is
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(ours[1]))


@defaults
def test_a_gradient_is_zero_exactly_where_the_mask_is(kind, changes, rng):
    variant, config, definition, params = made(kind, changes)
    x, context = inputs(rng)
    mask = np.asarray(variant.mask(config, context))
    assert not np.triu(mask, 1).any()

    @jax.jit
    def gradient(cotangent):
        return jax.vjp(lambda x: forward(definition, params, x, context), x)[1](cotangent)[0]

    for query in (0, 5, LENGTH // 2, LENGTH - 6, LENGTH - 1):
        cotangent = np.zeros(x.shape, np.float32)
        cotangent[:, query] = rng.normal(size=(x.shape[0], WIDTH))
        reached = np.abs(gradient(jnp.asarray(cotangent))).max(axis=-1)
        np.testing.assert_array_equal(reached[~mask[:, query]], 0.0)
        # a choice leaves out some of what may be seen
        chooses = kind == "moba" or getattr(config, "mode", "") == "sparse"
        some = np.any if chooses else np.all
        assert some(reached[mask[:, query]] > 0)


@defaults
def test_a_later_token_changes_no_earlier_output(kind, changes, rng):
    _, _, definition, params = made(kind, changes)
    x, context = inputs(rng)
    later = x.at[:, 17:].set(jnp.asarray(rng.normal(size=x[:, 17:].shape), jnp.float32))
    before, after = (compiled(definition)(params, t, context) for t in (x, later))
    np.testing.assert_array_equal(before[:, :17], after[:, :17])
    assert np.abs(before[:, 17:30] - after[:, 17:30]).max(axis=-1).all()


@defaults
def test_packed_documents_equal_separate_runs(kind, changes, rng):
    _, _, definition, params = made(kind, changes)
    x, context = inputs(rng)
    run = functools.partial(compiled(definition), params)
    together, segments = np.asarray(run(x, context)), np.asarray(context.segments)
    places = [np.nonzero(segments[r] == n)[0] for r in range(2) for n in (1, 2, 3)]
    alone, count = np.zeros((6, LENGTH, WIDTH), np.float32), np.zeros((6, 1), np.int32)
    for n, where in enumerate(places):  # each document at the start of a row of its own
        assert where.size
        alone[n, : where.size], count[n] = np.asarray(x)[n // 3, where], where.size
    order = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[None], (6, LENGTH))
    real = (order < count).astype(np.int32)
    pairs = [  # of rows, for the program that is compiled already
        run(jnp.asarray(alone[i : i + 2]), base.Context(*map(jnp.asarray, (r, o))))
        for i, r, o in ((i, real[i : i + 2], order[i : i + 2]) for i in (0, 2, 4))
    ]
    separate = np.concatenate(pairs)
    for n, where in enumerate(places):
        close(together[n // 3, where], separate[n, : where.size])
    assert (segments == 0).any()
    np.testing.assert_array_equal(together[segments == 0], 0.0)


@every
def test_decoding_equals_the_parallel_forward(kind, changes, rng):
    variant, config, definition, params = made(kind, changes)
    x = jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    parallel = np.asarray(compiled(definition)(params, x, one_document(2, LENGTH)))
    sizes = variant.cache_shapes(config, WIDTH, 2, LENGTH)
    cache = {name: jnp.zeros(size, jnp.float32) for name, size in sizes.items()}
    step = jax.jit(lambda x, cache, t: definition.merge(params, {}).decode(x, cache, t))
    for t in range(LENGTH):
        y, cache = step(x[:, t : t + 1], cache, jnp.int32(t))
        close(y[:, 0], parallel[:, t])
    assert {name: c.shape for name, c in cache.items()} == sizes


def test_moba_decodes_with_sums_of_blocks_that_are_rounded_once(rng):
    """What chooses blocks: added up in a bfloat16 cache they were up to a tenth off."""
    block, length = 64, 70  # the last block is cut short by the cache's end
    variant, config, definition, params = made("moba", {"block": block, "top_k": 2})
    sizes = variant.cache_shapes(config, WIDTH, 1, length)
    empty = {name: jnp.zeros(size, jnp.bfloat16) for name, size in sizes.items()}
    x = jnp.asarray(rng.normal(size=(length, 1, 1, WIDTH)), jnp.bfloat16)

    @jax.jit
    def run(x, cache):
        model = definition.merge(params, {})

        def step(cache, part):
            return model.decode(part[0], cache, part[1])[1], None

        return jax.lax.scan(step, cache, (x, jnp.arange(length)))[0]

    cache = {name: np.asarray(a, np.float64) for name, a in run(x, empty).items()}
    for m, stop in ((0, block), (1, length)):
        exact = cache["k"][0, m * block : stop].sum(0)
        np.testing.assert_allclose(cache["sums"][0, m], exact, rtol=2**-8, atol=1e-3)


@every
def test_its_figures_are_its_own(kind, changes):
    variant, config, _, params = made(kind, changes)
    held = [
        sum(int(np.prod(s)) for s in variant.cache_shapes(config, WIDTH, 3, length).values())
        for length in (5040, 10080)  # whole blocks of every size here
    ]
    # what grows with the text; a window and a block's tokens are held beside it
    growth = (held[1] - held[0]) / (3 * 5040)
    assert variant.kv_elements(config, WIDTH) == math.ceil(growth)
    assert held[0] > 0
    assert (growth > 0) == (kind != "sliding")
    # every projection is applied once to every token; a multiply-add counts as 2
    idle = () if variant.trains_own(config) else variant.own
    used = {name: part for name, part in params.items() if name not in idle}
    matrices = 0
    for path, p in jax.tree_util.tree_leaves_with_path(used):
        pools = "phi" in jax.tree_util.keystr(path)  # once a stride and key head: makes entries
        times = config.sizes(WIDTH)[1] * (64 // config.stride) / 64 if pools else 1
        matrices += times * p.size * (p.ndim > 1)
    assert variant.work(config, WIDTH, 64).linear == 2 * matrices
    works = [variant.work(config, WIDTH, length) for length in (64, 512, 4096)]
    for work in works:
        assert min(work) > 0
        assert work.core >= work.core_model
        # choosing has no backward pass
        assert work.core_backward >= work.core or getattr(config, "mode", "") == "sparse"
    assert works[0].core_model < works[1].core_model <= works[2].core_model


@every
def test_it_fits_the_house(kind, changes):
    variant, config, definition, params = made(kind, changes)
    assert variant.Config.KIND == kind
    assert spec.build(variant.Config, config.to_dict()) == config
    dims = jax.tree.leaves(definition.dims, is_leaf=lambda d: isinstance(d, tuple))
    for names, array in zip(dims, jax.tree.leaves(params), strict=True):
        assert len(names) == array.ndim
        assert array.dtype == jnp.float32
    x, context = inputs(np.random.default_rng(3))
    run, x = compiled(definition), x.astype(jnp.bfloat16)
    y = jax.eval_shape(run, params, x, context)
    assert (y.shape, y.dtype) == (x.shape, jnp.bfloat16)
    if changes == next(iter(SETTINGS.get(kind, {"default": {}}).values())):
        assert np.isfinite(np.asarray(run(params, x, context), np.float32)).all()
