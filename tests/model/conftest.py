"""Small models and batches for tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import shapes
from sparse_pretrain.attention import full, mla
from sparse_pretrain.model import block, ffn, lm
from sparse_pretrain.routing import moe, sigmoid_bias

MLA = mla.Config(heads=2, q_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=12)
GQA = full.Config(heads=4, kv_heads=2, softcap=20.0)
DENSE = ffn.DenseConfig(hidden=48)
EXPERTS = moe.Config(
    experts=8, top_k=2, hidden=24, shared=1, router=sigmoid_bias.Config(rate=0.01, balance=0.01)
)


def small(**changes) -> lm.Config:
    """Two kinds of attention and of feed-forward, a prefix and a stack."""
    values = dict(
        width=32,
        vocab=61,
        dtype="float32",
        blocks={
            "dense": block.Config(attention=GQA, ffn=DENSE),
            "moe": block.Config(attention=MLA, ffn=EXPERTS),
            "mixed": block.Config(attention=GQA, ffn=EXPERTS),
        },
        prefix=("dense",),
        pattern=("moe", "mixed"),
        repeats=2,
    )
    return lm.Config(**(values | changes))


def packed(rng, rows=4, length=24, vocab=61) -> shapes.Batch:
    """Rows of several documents, and some padding at the end of the last row."""
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    cuts = rng.random((rows, length)) < 0.15
    segments = (1 + np.cumsum(cuts, axis=1)).astype(np.int32)
    segments[-1, -5:] = 0
    positions = np.zeros_like(segments)
    for r in range(rows):
        for i in range(1, length):
            same = segments[r, i] == segments[r, i - 1]
            positions[r, i] = positions[r, i - 1] + 1 if same else 0
    weights = (segments > 0).astype(np.float32)
    return shapes.Batch(
        tokens[:, :-1], tokens[:, 1:], segments, positions, weights,
        3 * (segments > 0).astype(np.int32), np.zeros_like(segments),
    )


def drawn(like, std=0.05):
    """Random parameters, vectors about 1: a model's own initialisation compiles for seconds."""
    draw = np.random.default_rng(0)

    def one(x):
        return jnp.asarray((std * draw.normal(size=x.shape) + (len(x.shape) < 2)).astype(x.dtype))

    return jax.tree.map(one, like)


@pytest.fixture
def batch(rng):
    """A packed batch of four rows."""
    return packed(rng)
