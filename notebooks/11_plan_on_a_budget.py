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
# # Plan your own run on a budget
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** ten seconds.
#
# Dollars to FLOPs to a size, a number of tokens and a forecast loss, with an interval from a fitted
# law; then what dense and sparse models of that work per token hold, and what they need in memory.
# Rates are a chip's data sheet times a share that published runs reached.

# %%
import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain import optim
from sparse_pretrain.claims import base, bench, models, results
from sparse_pretrain.planning import chips, flops, memory

DOLLARS, PER_HOUR, CHIP, SHARE = 300.0, 2.0, "h100", 0.39
hours = DOLLARS / PER_HOUR
budget = hours * 3600 * chips.CHIPS[CHIP].bf16 * SHARE
print(f"${DOLLARS:.0f} at ${PER_HOUR} an hour: {hours:.0f} h of an {CHIP}, {budget:.2e} FLOPs")

# %% [markdown]
# The share is V3's own: 39 % of the bfloat16 rate over its whole training (claim A5).

# %%
known = base.load()
law = results.read(results.folder(), known["B1"], "laptop")["numbers"]
sizes = np.logspace(7.5, 10.5, 400)


def loss(params, compute):
    """Nats per token by the refitted Chinchilla law: on its text, with its tokenizer."""
    tokens = compute / (6 * params)
    return law["E"] + law["A"] / params ** law["alpha"] + law["B"] / tokens ** law["beta"]


fig, ax = plt.subplots(figsize=(7, 3.8))
for times in (0.25, 1, 4):
    curve = loss(sizes, times * budget)
    at = int(curve.argmin())
    ax.semilogx(sizes, curve, label=f"${times * DOLLARS:.0f}")
    ax.plot(sizes[at], curve[at], "ko", ms=4)
ax.set_xlabel("parameters (dots: the best size)")
ax.set_ylabel("forecast loss, nats/token")
ax.set_ylim(2, 3.2)
ax.legend()
fig.tight_layout()
curve = loss(sizes, budget)
best = sizes[int(curve.argmin())]
tokens = budget / (6 * best)
near = sizes[curve < curve.min() + 0.01]
print(f"best {best / 1e9:.2f}B parameters, {tokens / 1e9:.0f}B tokens, {curve.min():.3f} nats")
print(f"within 0.01 nats from {near[0] / 1e9:.2f}B to {near[-1] / 1e9:.2f}B: the valley is flat")

# %% [markdown]
# A real model of about that size, dense, and a mixture with the same work per token.

# %%
dense = models.dense(18, 2048, 5632, 32_000, 16, 16, 128, tied=True)
sparse = models.mixture(18, 2048, 704, 32_000, 16, 16, 128, 64, 8)
adamw = optim.TABLE["adamw"].Config()
held = {}
for name, model in (("dense", dense), ("64 experts, 8 chosen", sparse)):
    count, work = flops.parameters(model), flops.train_flops_per_token(model, 2048).model
    held[name] = memory.training_bytes(model, 2048, optimizer=adamw, ema=False)
    print(
        f"{name}: {count.total / 1e9:.2f}B held, {count.active / 1e9:.2f}B active, "
        f"{work / 1e9:.1f} GFLOP a token, {budget / work / 1e9:.0f}B tokens for the money, "
        f"{held[name]['total'] / 1e9:.0f} GB to train on one device"
    )
kinds = [k for k in held["dense"] if k != "total"]
fig, ax = plt.subplots(figsize=(7, 2.6))
left = np.zeros(2)
for kind in kinds:
    part = np.array([h[kind] / 1e9 for h in held.values()])
    ax.barh(list(held), part, left=left, label=kind)
    left += part
ax.axvline(80, color="black", lw=0.8, ls="--")
ax.set_xlabel("memory of a step of 2,048 tokens, GB (dashed: an H100)")
ax.legend(fontsize=7)
fig.tight_layout()

# %%
assert known["A5"].measure(bench.Bench(None)).passed
assert near[0] < best < near[-1]
assert abs(tokens / best - 20) < 10, "near Chinchilla's rule"
assert held["dense"]["total"] < 80e9 < held["64 experts, 8 chosen"]["total"]
