"""A13: Latent attention absorbed equals expanded; sparse attention that chooses all equals full.

Source: 2405.04434, section 2.1 and appendix C; 2512.02556.
Published: identities.
Kind: EXACT.
Tested: our MLA over a row against its decoder, which absorbs the projections; our DSA choosing at
    least as many tokens as there are, absorbed and through its sparse path, against MLA with the
    same weights. Float32, 2 rows of 24 tokens.
Criterion: 1e-5.
Cost: seconds, to compile.
Result: PASS at d4dca4e: absorbed 9.3e-08, sparse with all chosen 1.1e-07, of the largest output.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_pretrain import nn
from sparse_pretrain.attention import base as attention
from sparse_pretrain.attention import dsa, mla
from sparse_pretrain.claims import base

WIDTH, LENGTH = 32, 24
LATENT = dict(heads=2, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=12)
INDEX = dict(top=LENGTH, index_heads=2, index_dim=8, index_rope_dim=4)


def measure(bench):
    """The largest differences."""
    del bench
    sparse = nn.define(lambda keys: dsa.DSA(dsa.Config(**LATENT, **INDEX), WIDTH, keys))
    plain = nn.define(lambda keys: mla.MLA(mla.Config(**LATENT), WIDTH, keys))
    params, prices = sparse.init(jax.random.key(0))
    shared = {name: value for name, value in params.items() if name != "indexer"}
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    ones = np.ones((2, LENGTH), np.int32)
    context = attention.Context(ones, np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)))

    @jax.jit
    def three(params, shared, x):
        full = plain.merge(shared, prices)
        shapes = mla.MLA.cache_shapes(full.config, WIDTH, 2, LENGTH)
        cache = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

        def token(cache, at):
            y, cache = full.decode(jax.lax.dynamic_slice_in_dim(x, at, 1, 1), cache, at)
            return cache, y[:, 0]

        _, rows = jax.lax.scan(token, cache, jnp.arange(LENGTH, dtype=jnp.int32))
        chosen = sparse.merge(params, prices)(x, context)
        return full(x, context), jnp.moveaxis(rows, 0, 1), chosen

    expanded, absorbed, chosen = (np.asarray(y, np.float64) for y in three(params, shared, x))
    scale = np.abs(expanded).max()
    found = {
        "absorbed": float(np.abs(absorbed - expanded).max() / scale),
        "sparse": float(np.abs(chosen - expanded).max() / scale),
    }
    return base.Outcome(
        passed=max(found.values()) <= 1e-5,
        measured=f"absorbed {found['absorbed']:.1e}, sparse with all chosen {found['sparse']:.1e}, "
        "of the largest output",
        numbers=found,
    )
