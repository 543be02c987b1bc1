"""DSA against the equations of DeepSeek-V3.2, written out query by query in float64.

Attention is the expanded form, every head with keys of its own, where the module is absorbed; the
rotations are plane by plane. Only the frequencies are shared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base
from sparse_pretrain.model import layers

WIDTH, EPS = 20, 1e-6
SMALL = {
    "heads": 3, "kv_rank": 9, "nope_dim": 6, "rope_dim": 4, "v_dim": 5,
    "index_heads": 2, "index_dim": 8, "index_rope_dim": 4,
}
CASES = {
    "sparse": (23, {"top": 5}),
    "latent_queries": (17, {"top": 4, "q_rank": 7, "index_rope_dim": 0}),
    "yarn": (19, {"top": 6, "rope": {"interleaved": True, "factor": 4.0, "original": 8}}),
    "all": (14, {"top": 30}),
    "warmup": (15, {"top": 4, "mode": "warmup"}),
    "dense": (12, {"top": 4, "mode": "dense"}),
}
every = pytest.mark.parametrize("case", CASES)


def rms(x):
    return x / np.sqrt((x * x).mean() + EPS)


def turned(x, position, rope, neighbours):
    """All of x turned plane by plane: neighbours, or first half against second."""
    out, half = x.copy(), len(x) // 2
    for plane, frequency in enumerate(layers.rope_frequencies(len(x), rope) if half else ()):
        a, b = (2 * plane, 2 * plane + 1) if neighbours else (plane, plane + half)
        cos, sin = np.cos(position * float(frequency)), np.sin(position * float(frequency))
        out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


def index_keys(c, p, h):
    keys = []
    for t, x in enumerate(h):
        k = x @ p["w_k"]
        k = (k - k.mean()) / np.sqrt(k.var() + EPS) * p["k_scale"] + p["k_bias"]
        R = c.index_rope_dim
        keys.append(np.concatenate([turned(k[:R], t, c.rope, False), k[R:]]))
    return keys


def oracle(c, p, h):
    """Output [T, d] of one document and the indexer's loss at each query."""
    latents = [h_t @ p["w_dkv"] for h_t in h]
    rope_keys = [turned(x[c.kv_rank :], t, c.rope, c.rope.interleaved)
                 for t, x in enumerate(latents)]
    latents = [rms(x[: c.kv_rank]) * p["kv_norm"]["scale"] for x in latents]
    own, R = index_keys(c, p["indexer"], h), c.index_rope_dim
    scale = (c.nope_dim + c.rope_dim) ** -0.5 * c.rope.softmax_gain
    out, losses = np.zeros(h.shape), np.zeros(len(h))
    for t, x in enumerate(h):
        latent = rms(x @ p["w_dq"]) * p["q_norm"]["scale"] if c.q_rank else x
        scores = np.zeros(t + 1)
        for j in range(c.index_heads):
            q = latent @ p["indexer"]["w_q"][:, j]
            q = np.concatenate([turned(q[:R], t, c.rope, False), q[R:]])
            weight = (x @ p["indexer"]["w_w"][:, j]) * c.index_heads**-0.5
            scores += [weight * max(q @ own[s], 0.0) * c.index_dim**-0.5 for s in range(t + 1)]
        seen = sorted(range(t + 1), key=lambda s: (-scores[s], s))
        seen = seen[: c.top] if c.mode == "sparse" else seen
        mass, parts = np.zeros(len(seen)), []
        for head in range(c.heads):
            q = latent @ p["w_uq" if c.q_rank else "w_q"][:, head]
            q = np.concatenate(
                [q[: c.nope_dim], turned(q[c.nope_dim :], t, c.rope, c.rope.interleaved)]
            )
            keys = [np.concatenate([latents[s] @ p["w_uk"][:, head], rope_keys[s]]) for s in seen]
            e = np.exp([q @ k * scale for k in keys])
            share = e / e.sum()
            mass += share
            values = [latents[s] @ p["w_uv"][:, head] for s in seen]
            parts.append(sum(w * v for w, v in zip(share, values, strict=True)))
        out[t] = sum(o @ p["w_o"][head] for head, o in enumerate(parts))
        chosen = np.exp(scores[seen])
        target = mass / mass.sum()
        losses[t] = sum(target * np.log(target / (chosen / chosen.sum())))
    return out, losses


def made(case):
    """(config, definition, parameters of which none is what it starts as, x [1, T, d])."""
    length, changes = CASES[case]
    variant = attention.TABLE["dsa"]
    config = spec.build(variant.Config, SMALL | changes)
    definition = nn.define(lambda keys: variant(config, WIDTH, keys))
    rng = np.random.default_rng(7)
    params = jax.tree.map(
        lambda s: jnp.asarray(
            rng.normal(size=s.shape) * (s.shape[0] if len(s.shape) > 1 else 2) ** -0.5, jnp.float32
        ),
        definition.shapes,
    )
    x = jnp.asarray(rng.normal(size=(1, length, WIDTH)), jnp.float32)
    return config, definition, params, x


def attended(definition, params, x):
    """(output, the indexer's loss at each query or None) of one document."""
    place = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return definition.merge(params, {}).attend(x, base.Context(jnp.ones_like(place), place))


def plain(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@every
def test_it_equals_the_equations(case):
    config, definition, params, x = made(case)
    y, loss = jax.jit(lambda p, x: attended(definition, p, x))(params, x)
    want, want_loss = oracle(config, plain(params), plain(x)[0])
    np.testing.assert_allclose(y[0], want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).min(axis=1).max() > 1e-3
    assert (loss is None) == (config.mode == "dense")
    if loss is not None:
        np.testing.assert_allclose(loss[0], want_loss, atol=2e-5)
        assert want_loss.max() > 0.01


def leaves(params):
    return {jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


@pytest.mark.parametrize("case", ["sparse", "latent_queries", "warmup"])
def test_gradients_are_the_differences_of_the_equations(case):
    """Along a random direction of each parameter and of x; the indexer's own by its loss alone."""
    config, definition, params, x = made(case)
    rng = np.random.default_rng(8)
    cotangent = rng.normal(size=x.shape)

    def main(params, x):
        return jnp.sum(attended(definition, params, x)[0] * jnp.asarray(cotangent, jnp.float32))

    def indexed(params, x):
        return jnp.sum(attended(definition, params, x)[1])

    def gradients(params, x):
        found = (jax.grad(f, (0, 1))(params, x) for f in (main, indexed))
        return [leaves(of_params) | {"x": of_x} for of_params, of_x in found]

    by_output, by_loss = jax.jit(gradients)(params, x)
    got = {}
    for name in by_output:
        mine, other = by_output[name], by_loss[name]
        if "indexer" in name:
            mine, other = other, mine
        assert not np.asarray(other).any(), name  # each learns from its own loss alone, exactly
        got[name] = mine
    assert sum("indexer" in name for name in got) == 5

    tree = jax.tree.structure(params)
    flat, x64 = {n: np.asarray(a, np.float64) for n, a in leaves(params).items()}, plain(x)
    for name, gradient in got.items():
        direction = rng.normal(size=gradient.shape)
        step, sides = 1e-5, []
        for sign in (1, -1):
            moved = flat | {"x": x64}
            moved[name] = moved[name] + sign * step * direction
            y, loss = oracle(config, tree.unflatten([moved[n] for n in flat]), moved["x"][0])
            sides.append(loss.sum() if "indexer" in name else (y * cotangent[0]).sum())
        slope = (sides[0] - sides[1]) / (2 * step)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(slope - (np.asarray(gradient, np.float64) * direction).sum()) < 2e-4 * size, name
        assert size > 1e-3, name
