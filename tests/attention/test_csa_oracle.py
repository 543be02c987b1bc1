"""CSA and HCA against the equations of DeepSeek-V4, written out query by query in float64.

The oracle shares nothing with the module but the frequencies of the rotation: planes are
neighbours, entries are pooled one by one, and every query's softmax is a loop over what it sees.
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
    "heads": 4, "q_rank": 10, "dim": 12, "rope_dim": 4, "window": 5, "groups": 2, "group_rank": 7,
}
INDEX = {"index_heads": 3, "index_dim": 8, "index_rope_dim": 4}
CASES = {
    "hca": ("hca", 26, {"ratio": 6}),
    "hca_wide": ("hca", 19, {"ratio": 2, "window": 40, "rope_dim": 12, "groups": 4}),
    "hca_flat": ("hca", 19, {"ratio": 5, "rope_dim": 0, "groups": 1}),
    "csa": ("csa", 27, INDEX | {"ratio": 3, "top": 3}),
    "csa_all": ("csa", 22, INDEX | {"ratio": 2, "top": 40, "rope_dim": 0, "index_rope_dim": 0}),
    "csa_short": ("csa", 3, INDEX | {"ratio": 4, "top": 2}),
}
every = pytest.mark.parametrize("case", CASES)


def rms(x):
    return x / np.sqrt((x * x).mean() + EPS)


def turned(x, position, rope, count):
    """The last `count` entries turned plane by plane; one vector."""
    x = x.copy()
    start = len(x) - count
    for plane, frequency in enumerate(layers.rope_frequencies(count, rope) if count else ()):
        a, b = start + plane, start + plane + count // 2
        if rope.interleaved:
            a, b = start + 2 * plane, start + 2 * plane + 1
        angle = position * float(frequency)
        cos, sin = np.cos(angle), np.sin(angle)
        x[a], x[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return x


def entries(h, p, m, dim, overlap, rope, count):
    """The compressed entries of one document, h [T, d]; p the compressor's parameters."""
    done = []
    bias = p["bias"].reshape(m, -1)
    for i in range(len(h) // m):
        logits, values = [], []
        for r in range(m):  # the block's own tokens: the second half of the features, or all
            c, z = h[m * i + r] @ p["w_kv"], h[m * i + r] @ p["w_gate"]
            logits.append((z + bias[r])[-dim:])
            values.append(c[-dim:])
        if overlap and i > 0:
            for r in range(m):
                c, z = h[m * (i - 1) + r] @ p["w_kv"], h[m * (i - 1) + r] @ p["w_gate"]
                logits.append((z + bias[r])[:dim])
                values.append(c[:dim])
        entry = np.zeros(dim)
        for channel in range(dim):
            e = np.exp([z[channel] for z in logits])
            entry[channel] = sum(e * [c[channel] for c in values]) / sum(e)
        done.append(turned(rms(entry) * p["norm"]["scale"], i * m, rope, count))
    return done


def oracle(kind, c, p, h):
    """Output [T, d] of one document and the indexer's loss at each query."""
    sparse, H, R = kind == "csa", c.heads, c.rope_dim
    compressed = entries(h, p["compressor"], c.ratio, c.dim, sparse, c.rope, R)
    raw = [turned(rms(x @ p["w_kv"]) * p["kv_norm"]["scale"], t, c.rope, R)
           for t, x in enumerate(h)]
    if sparse:
        index_keys = entries(h, p["index_compressor"], c.ratio, c.index_dim, True, c.rope,
                             c.index_rope_dim)
    out, losses = np.zeros(h.shape), np.zeros(len(h))
    for t, x in enumerate(h):
        latent = rms(x @ p["w_dq"]) * p["q_norm"]["scale"]
        seen = list(range((t + 1) // c.ratio))
        if sparse:
            scores = [0.0 for _ in seen]
            for j in range(c.index_heads):
                q = turned(latent @ p["w_iq"][:, j], t, c.rope, c.index_rope_dim)
                weight = (x @ p["w_iw"][:, j]) * c.index_heads**-0.5
                for i in seen:
                    scores[i] += weight * max(q @ index_keys[i], 0.0) * c.index_dim**-0.5
            seen = sorted(seen, key=lambda i: (-scores[i], i))[: c.top]
        keys = [compressed[i] for i in seen] + raw[max(0, t - c.window + 1) : t + 1]
        o, mass = np.zeros((H, c.dim)), np.zeros(len(seen))
        for head in range(H):
            q = turned(rms(latent @ p["w_uq"][:, head]), t, c.rope, R)
            e = np.exp([q @ key / np.sqrt(c.dim) for key in keys])
            share = e / (np.exp(p["sinks"][head]) + sum(e))
            mass += share[: len(seen)]
            o[head] = turned(sum(s * key for s, key in zip(share, keys, strict=True)), -t, c.rope,
                             R)
        groups = o.reshape(c.groups, -1)
        out[t] = np.concatenate([groups[g] @ p["w_group"][g] for g in range(c.groups)]) @ p["w_o"]
        if sparse and seen:
            target = mass / sum(mass)
            chosen = np.exp([scores[i] for i in seen])
            losses[t] = sum(target * np.log(target / (chosen / sum(chosen))))
    return out, losses


def made(case):
    """(kind, config, definition, parameters of which none is what it starts as, x [1, T, d])."""
    kind, length, changes = CASES[case]
    variant = attention.TABLE[kind]
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
    return kind, config, definition, params, x


def attended(definition, params, x):
    """(output, the indexer's loss at each query or None) of one document."""
    place = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return definition.merge(params, {}).attend(x, base.Context(jnp.ones_like(place), place))


def plain(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@every
def test_it_equals_the_equations(case):
    kind, config, definition, params, x = made(case)
    y, loss = jax.jit(lambda p, x: attended(definition, p, x))(params, x)
    want, want_loss = oracle(kind, config, plain(params), plain(x)[0])
    np.testing.assert_allclose(y[0], want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).min(axis=1).max() > 1e-3
    if loss is not None:
        np.testing.assert_allclose(loss[0], want_loss, atol=2e-5)
        assert case == "csa_all" or want_loss.max() > 0.01
    assert (loss is None) == (kind == "hca" or case == "csa_short")


def leaves(params):
    return {jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


@pytest.mark.parametrize("case", ["hca", "csa"])
def test_gradients_are_the_differences_of_the_equations(case):
    """Along a random direction of each parameter and of x; the indexer's own by its loss alone."""
    kind, config, definition, params, x = made(case)
    rng = np.random.default_rng(8)
    cotangent = rng.normal(size=x.shape)

    def main(params, x):
        y, loss = attended(definition, params, x)
        return jnp.sum(y * jnp.asarray(cotangent, jnp.float32)), loss

    def indexed(params, x):
        return jnp.sum(attended(definition, params, x)[1])

    got = jax.jit(lambda *a: jax.grad(main, (0, 1), has_aux=True)(*a)[0])(params, x)
    got = leaves(got[0]) | {"x": got[1]}
    learned = {name: "index" in name or "w_i" in name for name in got}
    if kind == "csa":
        assert any(learned.values())
        loss = jax.jit(jax.grad(indexed, (0, 1)))(params, x)
        loss = leaves(loss[0]) | {"x": loss[1]}
        for name, gradient in loss.items():  # each learns from its own loss alone, exactly
            assert not np.asarray(got[name] if learned[name] else gradient).any(), name
        got = {n: loss[n] if learned[n] else g for n, g in got.items()}

    tree = jax.tree.structure(params)
    flat, x64 = {n: np.asarray(a, np.float64) for n, a in leaves(params).items()}, plain(x)
    for name, gradient in got.items():
        direction = rng.normal(size=gradient.shape)
        step, sides = 1e-5, []
        for sign in (1, -1):
            moved = flat | {"x": x64}
            moved[name] = moved[name] + sign * step * direction
            y, loss = oracle(kind, config, tree.unflatten([moved[n] for n in flat]), moved["x"][0])
            sides.append(loss.sum() if learned[name] else (y * cotangent[0]).sum())
        slope = (sides[0] - sides[1]) / (2 * step)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(slope - (np.asarray(gradient, np.float64) * direction).sum()) < 2e-4 * size, name
        assert size > 1e-3, name
