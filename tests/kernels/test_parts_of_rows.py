"""Queries that are a part of a row: as the same queries of the whole row, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash import flash
from kernels_pallas.indexer import index_kl_dense, index_select

B, L, D, PART = 2, 48, 8, 16
STRIDED = dict(stride=4, span=4)


def _arrays(rng, keys):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    segments = jnp.asarray(np.where(np.arange(L) < 21, 1, 2)[None].repeat(B, 0), jnp.int32)
    of_keys = segments[:, :: L // keys]
    q, k, v = normal(B, L, 4, D), normal(B, keys, 2, D), normal(B, keys, 2, D)
    return q, k, v, segments, of_keys, normal(B, L, 4, D)


def _in_parts(function, queries):
    """What `function(queries, first row)` gives for each part, as one; `first` is traced."""
    run = jax.jit(function)
    parts = [
        run(jax.tree.map(lambda x, a=a: x[:, a : a + PART], queries), jnp.int32(a))
        for a in range(0, L, PART)
    ]
    return jax.tree.map(lambda *p: jnp.concatenate(p, axis=1), *parts)


@pytest.mark.parametrize("how", [{}, {"window": 13}, STRIDED])
def test_flash(how, rng):
    q, k, v, segments, of_keys, g = _arrays(rng, L // how.get("stride", 1))

    def value(q, k, v, segments, g, **more):
        o = flash(q, k, v, segments_q=segments, segments_k=of_keys, scale=0.3, **how, **more)
        return jnp.sum(o * g), o

    whole = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    (_, o), (dq, dk, dv) = whole(q, k, v, segments, g)

    def part(x, first):
        q, segments, g = x
        (_, o), d = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(
            q, k, v, segments, g, first=first
        )
        return o, d[0], d[1][:, None], d[2][:, None]

    found = _in_parts(part, (q, segments, g))
    for a, b in zip(found, (o, dq), strict=False):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(found[2:], (dk, dv), strict=True):
        np.testing.assert_allclose(a.sum(1), b, atol=5e-6)


@pytest.mark.parametrize("how", [{}, STRIDED])
def test_indexer(how, rng):
    q, k, _, segments, of_keys, _ = _arrays(rng, L // how.get("stride", 1))
    w, index_k = q[..., 0], k[:, :, 0]
    lse = jnp.ones((B, L, 4), jnp.float32)
    marks = dict(segments_k=of_keys, scale=0.5, **how)

    def both(x, first):
        q, w, segments, lse = x
        chosen = index_select(
            q, index_k, w, top=5, segments_q=segments, first=first, **marks
        )

        def loss(q):
            return index_kl_dense(
                q, index_k, w, q, k, lse, main_scale=0.3, segments_q=segments, first=first, **marks
            )

        kl, pull = jax.vjp(loss, q)
        return chosen, kl, pull(jnp.ones_like(kl))[0]

    whole = jax.jit(both, static_argnums=1)((q, w, segments, lse), 0)
    chosen, kl, dq = _in_parts(both, (q, w, segments, lse))
    np.testing.assert_array_equal(chosen, whole[0])
    np.testing.assert_allclose(kl, whole[1], atol=1e-6)
    np.testing.assert_allclose(dq, whole[2], atol=1e-6)
