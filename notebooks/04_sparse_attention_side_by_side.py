# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What each query sees: NSA, MoBA, DSA, CSA and HCA side by side
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** a minute or two, to compile.
#
# Every variant here states its own mask, and the test suite holds it to dense attention under that
# mask. So the pictures below are not drawings of a paper's idea: they are what the code reads, for
# a row of 64 tokens at random weights. Rows are queries, columns are keys.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain import attention, nn
from sparse_pretrain.attention import base

WIDTH, LENGTH = 32, 64
ones = np.ones((1, LENGTH), np.int32)
context = base.Context(ones, np.arange(LENGTH, dtype=np.int32)[None])
x = jnp.asarray(np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH)), jnp.float32)


def layer(kind, **settings):
    """The variant with random weights."""
    variant = attention.TABLE[kind]
    config = variant.Config(**settings)
    definition = nn.define(lambda keys: variant(config, WIDTH, keys))
    return definition.merge(*definition.init(jax.random.key(1)))


def reads(kind, **settings):
    """How strongly each output depends on each input token: what reaches a query at all.

    The gradient of an output with respect to a token it cannot see is exactly zero, so this needs
    nothing from the variant but its forward pass.
    """
    module = layer(kind, **settings)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=WIDTH), jnp.float32)
    jacobian = jax.jit(jax.jacrev(lambda x: module(x, context)[0] @ weights))(x)
    return np.asarray(jnp.abs(jacobian[:, 0]).sum(-1) > 0)


# %%
grouped = dict(heads=2, head_dim=16)
compressed = dict(heads=2, q_rank=16, dim=16, rope_dim=8, window=8, groups=1, group_rank=16)
latent = dict(heads=2, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8)
index = dict(index_heads=2, index_dim=8, index_rope_dim=4)
variants = {
    "full": grouped,
    "sliding": grouped | dict(window=8, sinks=False),
    "moba": grouped | dict(block=8, top_k=3),
    "nsa": grouped | dict(span=8, stride=4, block=8, top_k=3, local=1, window=8),
    "dsa": latent | index | dict(top=12),
    "csa": compressed | index | dict(ratio=4, top=4),
    "hca": compressed | dict(ratio=16),
}
seen = {name: reads(name, **settings) for name, settings in variants.items()}

# %%
fig, axes = plt.subplots(2, 4, figsize=(12, 6.4))
for ax, (name, mask) in zip(axes.flat, seen.items(), strict=False):
    stated = attention.TABLE[name].mask(attention.TABLE[name].Config(**variants[name]), context)
    allowed = np.asarray(stated)[0]
    allowed = allowed if allowed.ndim == 2 else allowed.any(0)
    picture = np.where(mask, 2, np.where(allowed, 1, 0))
    ax.imshow(picture, cmap="Blues", vmin=0, vmax=2.6, interpolation="nearest")
    ax.set_title(f"{name}: {100 * mask.sum() / seen['full'].sum():.0f} % of full")
    ax.set_xlabel("key, token")
    ax.set_ylabel("query, token")
axes.flat[-1].axis("off")
axes.flat[-1].text(
    0,
    0.6,
    "dark: the query's output depends on the key\n"
    "light: the stated mask allows it,\nand the choice left it out",
)
fig.tight_layout()

# %% [markdown]
# NSA, CSA and HCA read *entries* that stand for several tokens, so their outputs depend, through
# few numbers, on much of the past: dark does not mean expensive. What they cost is another picture:
# keys that the last query reads, by length.

# %%
lengths = 2 ** np.arange(10, 21)
keys = {
    "full": lengths,
    "moba, 12 blocks of 4096": np.minimum(lengths, 12 * 4096),
    "nsa": np.minimum(lengths, lengths // 16 + 16 * 64 + 512),
    "dsa, 2048": np.minimum(lengths, 2048),
    "csa, 1024 of ratio 4": np.minimum(lengths // 4, 1024) + 128,
    "hca, ratio 128": lengths // 128 + 128,
}
fig, ax = plt.subplots(figsize=(7, 3.8))
for name, count in keys.items():
    ax.loglog(lengths, count, label=name)
ax.set_xlabel("context, tokens")
ax.set_ylabel("keys or entries read by the last query")
ax.legend()
fig.tight_layout()

# %%
order = np.arange(LENGTH)
for name, mask in seen.items():
    assert not mask[order[:, None] < order[None, :]].any(), f"{name} sees the future"
assert seen["full"].sum() == LENGTH * (LENGTH + 1) // 2
assert (seen["sliding"].sum(1) <= 8).all()
assert (seen["moba"].sum(1) <= 2 * 24).all(), "two heads of three blocks"
for claim in ("A7", "A10"):
    from sparse_pretrain.claims import base as claims
    from sparse_pretrain.claims import bench

    assert claims.load()[claim].measure(bench.Bench(None)).passed
