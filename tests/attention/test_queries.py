"""A backward pass by chunks of queries, against that of the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base
from sparse_pretrain.sharding import ops

WIDTH, LENGTH = 48, 41  # four chunks of 11, the last one short
COMPRESSED = {"q_rank": 12, "dim": 16, "rope_dim": 8, "window": 6, "group_rank": 10}
INDEX = {"index_heads": 3, "index_dim": 8, "index_rope_dim": 4}
LATENT = {"heads": 2, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "v_dim": 12}
SETTINGS = {
    "moba": {"heads": 4, "kv_heads": 2, "block": 5, "top_k": 3},
    "sliding": {"heads": 4, "window": 7},
    "nsa": {"heads": 4, "kv_heads": 2, "span": 4, "stride": 2, "block": 4, "top_k": 4, "window": 5},
    "csa": COMPRESSED | INDEX | {"ratio": 4, "top": 3},
    "hca": COMPRESSED | {"ratio": 8},
    "dsa": LATENT | INDEX | {"top": 7},
}
KINDS = [k if k == "sliding" else pytest.param(k, marks=pytest.mark.slow) for k in SETTINGS]


def _context():
    """A row of one document, and one of two and padding."""
    segments, positions = np.ones((2, LENGTH), np.int32), np.tile(np.arange(LENGTH), (2, 1))
    segments[1, 17:33], segments[1, 33:] = 2, 0
    positions[1, 17:33] -= 17
    positions[1, 33:] = 0
    return base.Context(jnp.asarray(segments), jnp.asarray(positions, jnp.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_queries_give_what_the_whole_row_gives(kind, monkeypatch):
    """Output, the indexer's loss, and all gradients, in float64: but for rounding of angles."""
    variant, rng = attention.TABLE[kind], np.random.default_rng(3)
    config = spec.build(variant.Config, SETTINGS[kind])
    definition = nn.define(lambda keys: variant(config, WIDTH, keys))
    with jax.enable_x64(True):
        params, _ = definition.init(jax.random.key(0))
        params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3 + 0.1), params)
        x, dy = (jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH))) for _ in range(2))
        context, chunks = _context(), []

        def results(longest):
            monkeypatch.setattr(ops, "LONG_ROW", longest)
            chunks.append(ops.queries_at_once(LENGTH))

            def loss(params, x):
                y, own = definition.merge(params, {}).attend(x, context)
                total = jnp.sum(y * dy)
                return total if own is None else total + jnp.sum(own * dy[:, :, 0]), (y, own)

            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

        whole, parts = results(LENGTH), results(LENGTH - 1)
    assert chunks == [None, 11]
    for want, got in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * (1 + np.abs(want).max()))
