"""NSA against the equations of its paper, written out query by query in float64 for one document.

The oracle shares nothing with the module but the frequencies of the rotation: entries are made
one by one, a block's score is added up token by token, and every branch is a loop over its keys.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash.own import own_block
from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base, selection
from sparse_pretrain.model import layers

WIDTH, DIM, EPS = 12, 6, 1e-6
SMALL = {"heads": 4, "head_dim": DIM, "hidden": 7, "window": 5}
CASES = {
    "paper": (
        46,
        {"kv_heads": 2, "span": 4, "stride": 2, "block": 8, "top_k": 4, "local": 2},
    ),
    "wide": (
        23,
        {"kv_heads": 1, "span": 9, "stride": 3, "block": 3, "top_k": 3, "local": 1,
         "qk_norm": False, "rope": {"interleaved": True}},
    ),
}


def rms(x, scale):
    return x if scale is None else x / np.sqrt((x * x).mean() + EPS) * scale


def turned(x, position, rope):
    x = x.copy()
    for plane, frequency in enumerate(layers.rope_frequencies(DIM, rope)):
        a, b = (2 * plane, 2 * plane + 1) if rope.interleaved else (plane, plane + DIM // 2)
        cos, sin = np.cos(position * float(frequency)), np.sin(position * float(frequency))
        x[a], x[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return x


def phi(tokens, p):
    """The entry of a block of vectors."""
    place = p["place"].reshape(len(tokens), DIM)
    hidden = np.concatenate([t + e for t, e in zip(tokens, place, strict=True)]) @ p["w_in"]
    return (hidden / (1 + np.exp(-hidden))) @ p["w_out"]


def weights(q, keys):
    e = np.exp([q @ key / np.sqrt(DIM) for key in keys])
    return e / e.sum() if len(keys) else e


def oracle(c, p, x):
    """Output [T, D] of one document, and the blocks that each query and key head chose."""
    T, K = len(x), c.kv_heads
    scale = {n: p[n]["scale"] if n in p else None
             for n in ("q_norm", "k_norm", "k_norm_window", "k_norm_compress")}
    q = [[turned(rms(t @ p["w_q"][:, h], scale["q_norm"]), n, c.rope) for n, t in enumerate(x)]
         for h in range(c.heads)]

    def rows(w, norm=None, turn=False):
        found = [[rms(t @ p[w][:, k], norm) for t in x] for k in range(K)]
        return [[turned(t, n, c.rope) for n, t in enumerate(r)] for r in found] if turn else found

    k_near, v_near = rows("w_k_window", scale["k_norm_window"], True), rows("w_v_window")
    k_all, v_all = rows("w_k", scale["k_norm"], True), rows("w_v")
    k_raw, v_raw = rows("w_k_compress"), rows("w_v_compress")
    starts = [s for s in range(0, T, c.stride) if s + c.span <= T]
    k_entry = [[turned(rms(phi(k_raw[k][s : s + c.span], p["phi_k"]), scale["k_norm_compress"]),
                       s, c.rope) for s in starts] for k in range(K)]
    v_entry = [[phi(v_raw[k][s : s + c.span], p["phi_v"]) for s in starts] for k in range(K)]

    out, choices = np.zeros(x.shape), {}
    for t, k in itertools.product(range(T), range(K)):
        group = range(k * c.heads // K, (k + 1) * c.heads // K)
        ended = [i for i, s in enumerate(starts) if s + c.span - 1 <= t]
        share = {h: weights(q[h][t], [k_entry[k][i] for i in ended]) for h in group}
        now, scores = t // c.block, {}
        for j in range(now + 1):
            tokens = set(range(j * c.block, (j + 1) * c.block))
            scores[j] = sum(
                share[h][n] * len(tokens & set(range(starts[i], starts[i] + c.span))) / c.stride
                for h in group for n, i in enumerate(ended)
            )
            if j == 0 or j > now - c.local:
                scores[j] = np.inf
        best = sorted(sorted(scores, key=lambda j: (-scores[j], j))[: c.top_k])
        choices[t, k] = best
        read = [s for j in best for s in range(j * c.block, min((j + 1) * c.block, t + 1))]
        near = range(max(0, t - c.window + 1), t + 1)
        for h in group:
            branches = (
                sum((w * v_entry[k][i] for w, i in zip(share[h], ended, strict=True)),
                    np.zeros(DIM)),
                sum(w * v_all[k][s] for w, s in
                    zip(weights(q[h][t], [k_all[k][s] for s in read]), read, strict=True)),
                sum(w * v_near[k][s] for w, s in
                    zip(weights(q[h][t], [k_near[k][s] for s in near]), near, strict=True)),
            )
            for n, o in enumerate(branches):
                gate = 1 / (1 + np.exp(-(x[t] @ p["w_gate"][:, n * c.heads + h])))
                out[t] += gate * o @ p["w_o"][h]
    return out, choices


def made(length, changes):
    """(config, definition, parameters of which none is what it starts as, x [T, D])."""
    config = spec.build(attention.NSA.Config, SMALL | changes)
    definition = nn.define(lambda keys: attention.NSA(config, WIDTH, keys))
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda s: jnp.asarray(
            rng.normal(size=s.shape) * (s.shape[0] if len(s.shape) > 1 else 2) ** -0.5, jnp.float32
        ),
        definition.shapes,
    )
    return config, definition, params, jnp.asarray(rng.normal(size=(length, WIDTH)), jnp.float32)


def forward(definition, params, x_TxD):
    place = jnp.arange(x_TxD.shape[0], dtype=jnp.int32)[None]
    return definition.merge(params, {})(x_TxD[None], base.Context(jnp.ones_like(place), place))[0]


def plain(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_equations(case):
    """Gradients along a random direction of each parameter and of x, by differences."""
    config, definition, params, x = made(*CASES[case])
    rng = np.random.default_rng(6)
    cotangent = rng.normal(size=x.shape)

    @jax.jit
    def value_and_gradients(params, x):
        y, pull = jax.vjp(lambda p, x: forward(definition, p, x), params, x)
        return y, pull(jnp.asarray(cotangent, jnp.float32))

    y, got = value_and_gradients(params, x)
    want, choices = oracle(config, plain(params), plain(x))
    np.testing.assert_allclose(y, want, atol=2e-5 * np.abs(want).max())
    # some query's scores, and not its place, chose what it reads
    free = config.top_k - 1 - config.local
    late = [b for (t, _), b in choices.items() if t // config.block - config.local > free]
    assert len({tuple(b[1 : 1 + free]) for b in late}) > 1

    flat, tree = jax.tree.flatten((params, x))
    flat = plain(flat)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(got)]
    for n, gradient in enumerate(plain(jax.tree.leaves(got))):
        direction = rng.normal(size=gradient.shape)
        sides = []
        for sign in (1, -1):
            moved = list(flat)
            moved[n] = moved[n] + sign * 1e-6 * direction
            y, same = oracle(config, *tree.unflatten(moved))
            assert same == choices
            sides.append((y * cotangent).sum())
        slope = (sides[0] - sides[1]) / 2e-6
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(slope - (gradient * direction).sum()) < 2e-4 * size, names[n]
        assert size > 1e-3, names[n]


@pytest.mark.parametrize("length", [3, 13])
def test_texts_shorter_than_a_stride_or_a_block(length):
    changes = {"kv_heads": 2, "span": 10, "stride": 5, "block": 50}
    config, definition, params, x = made(length, changes)
    y = jax.jit(lambda p, x: forward(definition, p, x))(params, x)
    want, _ = oracle(config, plain(params), plain(x))
    np.testing.assert_allclose(y, want, atol=2e-5 * np.abs(want).max())


def test_tiles_of_the_own_block_are_dense_attention_inside_blocks():
    """However blocks lie in the row, and past its last whole tile; values and gradients."""
    B, L, H, K, D, size = 2, 530, 2, 1, 4, 128
    rng = np.random.default_rng(9)
    q, k, v = (jnp.asarray(rng.normal(size=(B, L, n, D)), jnp.float32) for n in (H, K, K))
    lengths = [rng.choice(np.arange(1, size + 1), 60) for _ in range(B)]
    ids = jnp.asarray([np.repeat(np.arange(60), n)[:L] for n in lengths], jnp.int32)
    row = jnp.arange(L)
    seen = (ids[:, :, None] == ids[:, None]) & (row[:, None] >= row[None])[None]
    seen &= (ids != 0)[:, :, None]

    def dense(q, k, v):
        score = jnp.einsum("blhd,bsd->bhls", q, k[:, :, 0]) * 0.5
        score = jnp.where(seen[:, None], score, -1e30)
        lse = jax.nn.logsumexp(score, axis=-1)
        p = jnp.where(seen[:, None], jnp.exp(score - lse[..., None]), 0)
        return jnp.einsum("bhls,bsd->blhd", p, v[:, :, 0]), jnp.moveaxis(lse, 1, 2)

    def ours(q, k, v):
        return own_block(q, k, v, ids, ids, size=size, scale=0.5)

    weigh = jnp.asarray(rng.normal(size=(B, L, H, D + 1)), jnp.float32)

    def results(attend):
        def loss(*inputs):
            o, lse = attend(*inputs)
            lse = jnp.where((ids != 0)[:, :, None], lse, 0)
            return jnp.sum(weigh * jnp.concatenate([o, lse[..., None]], axis=-1)), (o, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    assert (ids == 0).any()
    for got, want in zip(*(jax.tree.leaves(results(f)) for f in (ours, dense)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
        assert np.abs(want).max() > 0.1


def test_a_block_shares_as_much_of_an_entry_as_the_paper_weighs():
    """l = 32, d = 16, l' = 64: entries 4j - 1 to 4j + 3 weigh 1, 2, 2, 2, 1."""
    sizes = selection.Sizes(32, 16, 64, 16, 2)
    assert [sizes.overlap(n) for n in range(-3, 6)] == [0, 0, 1, 2, 2, 2, 1, 0, 0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"span": 30}, "span: 30 is not a multiple of stride 16"),
    ({"block": 40}, "block: 40 is not a multiple of stride 16"),
    ({"top_k": 3, "local": 3}, "top_k: 3 must be above local 3"),
    ({"window": 0}, "window: must be positive, got 0"),
    ({"softcap": 5.0}, "softcap: nsa has none, got 5.0"),
])
def test_a_configuration_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec.build(attention.NSA.Config, changes)
