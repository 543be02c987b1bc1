"""One softmax over keys that are read in several ways, against dense attention to all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import joined
from kernels_pallas.flash import own
from sparse_pretrain.sharding import joined as spread
from sparse_pretrain.sharding import ops

B, L, H, K, D, SIZE = 2, 24, 4, 2, 6, 4


def _arrays(rng):
    """q, the keys and values of three kinds, and sinks: what has gradients."""
    sizes = {
        "q": (B, L, H, D), "k": (B, L, K, D), "v": (B, L, K, D), "k_entry": (B, L // SIZE, K, D),
        "v_entry": (B, L // SIZE, K, D), "kv": (B, L, D), "sinks": (H,),
    }
    return {name: jnp.asarray(rng.normal(size=size)) for name, size in sizes.items()}


def _where(rng):
    """Block numbers (the last rows are padding), chosen blocks and listed tokens, some twice."""
    ids = np.arange(L) // SIZE + 1
    ids = np.stack([ids, np.where(np.arange(L) > 18, 0, (np.arange(L) + 2) // SIZE + 1)])
    chosen = rng.integers(-1, L // SIZE, (B, L, K, 3))
    chosen[:, 5] = -1
    listed = rng.integers(-1, L, (B, L, 7))
    listed[:, 6] = -1
    return [np.asarray(x, np.int32) for x in (ids, chosen, listed)]


def _parts(arrays, ids, chosen, listed):
    k, v = arrays["k"], arrays["v"]
    starts = jnp.arange(0, L, SIZE, dtype=jnp.int32)[None].repeat(B, 0)
    entries = {"k": arrays["k_entry"], "v": arrays["v_entry"], "sinks_H": arrays["sinks"]}
    return [
        joined.Part("own_block", {"k": k, "v": v, "ids_q": ids, "ids_k": ids},
                    {"size": SIZE, "scale": 0.7}),
        joined.Part("block_sparse", {"k": k, "v": v, "blocks_BxLxGxN": chosen,
                                     "starts_BxM": starts}, {"block": SIZE, "scale": 0.7}),
        joined.Part("flash", entries, {"stride": SIZE, "span": SIZE, "scale": 0.5}),
        joined.Part("token_sparse", {"kv": arrays["kv"], "chosen_BxLxN": listed},
                    {"v_dim": D, "scale": 0.3}),
    ]


def _dense(arrays, ids, chosen, listed):
    """(o, lse), every key with a logit of its own for each part that shows it."""
    row = np.arange(L)
    same = (ids[:, :, None] == ids[:, None]) & (row[:, None] >= row[None]) & (ids != 0)[:, :, None]
    of_block = (chosen[..., None] == (row // SIZE)).any(3)  # [B, L, K, S]
    seen = [
        np.broadcast_to(same[:, :, None], (B, L, K, L)), of_block,
        np.broadcast_to((np.arange(SIZE - 1, L, SIZE)[None] <= row[:, None])[None, :, None],
                        (B, L, K, L // SIZE)),
        np.broadcast_to((listed[..., None] == row).any(2)[:, :, None], (B, L, K, L)),
    ]
    tokens = arrays["kv"][:, :, None].repeat(K, 2)
    keys = [(arrays["k"], arrays["v"], 0.7)] * 2
    keys += [(arrays["k_entry"], arrays["v_entry"], 0.5), (tokens, tokens, 0.3)]
    q = arrays["q"].reshape(B, L, K, H // K, D)
    logits = [jnp.where(s[:, :, :, None], jnp.einsum("blkgd,bskd->blkgs", q, k) * scale, -jnp.inf)
              for s, (k, _, scale) in zip(seen, keys, strict=True)]
    sink = jnp.broadcast_to(arrays["sinks"].reshape(1, 1, K, H // K, 1), (B, L, K, H // K, 1))
    whole = jnp.concatenate([*logits, sink], axis=-1)
    lse = jax.nn.logsumexp(whole, axis=-1)
    p = jnp.split(jnp.exp(whole - lse[..., None]), np.cumsum([s.shape[3] for s in seen]), axis=-1)
    o = sum(jnp.einsum("blkgs,bskd->blkgd", w, v) for w, (_, v, _) in zip(p, keys, strict=False))
    return o.reshape(B, L, H, D), lse.reshape(B, L, H)


@pytest.fixture(scope="module")
def four_ways():
    """Where the parts are, the dense results in float64, and what gets results of an `attend`."""
    rng = np.random.default_rng(11)
    where = _where(rng)
    with jax.enable_x64(True):
        arrays = _arrays(rng)
        weigh = jnp.asarray(rng.normal(size=(B, L, H, D + 1)))

        def results(attend):
            def loss(arrays):
                o, lse = attend(arrays)
                return jnp.sum(weigh * jnp.concatenate([o, lse[..., None]], -1)), (o, lse)

            return jax.jit(jax.grad(loss, has_aux=True))(arrays)

        given = [jnp.asarray(x) for x in where]
        want = results(lambda a: _dense(a, *where))
    return given, want, results


@pytest.mark.parametrize("way", ["joined", "recalled", "separate ops"])
def test_four_ways_are_one_softmax_with_its_gradients(way, four_ways, monkeypatch):
    """All parts as one; from what they gave before; and merged where one is another op's."""
    monkeypatch.setattr(own, "QUERIES", 2 * SIZE)  # tiles, and several steps of them
    given, want, results = four_ways
    if way == "separate ops":
        monkeypatch.setattr(spread, "_by_xla", lambda *_: False)
        monkeypatch.setattr(joined, "attend", None)  # and is not

    def attend(arrays):
        parts = _parts(arrays, *given)
        if way == "separate ops":
            return ops.one_softmax(arrays["q"], *parts)
        if way == "joined":
            return joined.attend(arrays["q"], parts)
        return joined.recall(arrays["q"], parts, *want[1])

    with jax.enable_x64(True):
        got = results(attend)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, want)
    assert all(np.abs(g).max() > 0.1 for g in jax.tree.leaves(got[0]))


@pytest.mark.parametrize("start", [0, 8])
def test_the_own_block_of_a_part_of_a_row(start, rng, monkeypatch):
    """Queries from a traced row on: as those of the whole row; keys' gradients add up."""
    monkeypatch.setattr(own, "QUERIES", 2 * SIZE)
    arrays, (ids, *_), n = _arrays(rng), _where(rng), 16
    q, k, v = (arrays[name] for name in "qkv")
    do = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    lse, delta = (jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32) for _ in range(2))
    keys = (k, v)

    def both(first, q, ids_q, do, lse, delta):
        options = dict(size=SIZE, scale=0.7, first=first)
        o = own.own_block(q, *keys, ids_q, ids, **options)
        return o, own.part_gradients(q, *keys, ids_q, ids, do, lse, delta, **options)

    def cut(x):
        return x[:, start:start + n]

    parts = [cut(x) for x in (q, ids, do, lse, delta)]
    (o, _), (dq, dk, dv) = jax.jit(both)(jnp.int32(start), *parts)
    inside = ((np.arange(L) >= start) & (np.arange(L) < start + n))[None, :, None]
    only = jnp.where(inside, lse, 1e30)  # weights of the other rows are 0
    (want, _), grads = both(None, q, ids, do, only, delta)
    np.testing.assert_allclose(o, cut(want), atol=1e-5)
    np.testing.assert_allclose(dq, cut(grads[0]), atol=1e-4)
    for a, b in zip((dk, dv), grads[1:], strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-4)
