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
# # Muon against AdamW
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** ten seconds.
#
# Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction moves
# equally far. What it is worth has been told as half the FLOPs; here are the iteration itself, the
# published race on GPT-2, and what the printed laws imply.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain.claims import base, bench, results
from sparse_pretrain.optim import newton_schulz

known, where = base.load(), results.folder()
race = results.read(where, known["B6"], "laptop")
if race is None:
    raise SystemExit("run sparse-pretrain reproduce B6 first")

gradient = np.random.default_rng(0).normal(size=(128, 256)) * np.logspace(0, -2, 256)
before = np.linalg.svd(gradient, compute_uv=False)
turned = newton_schulz.orthogonalize(jnp.asarray(gradient, jnp.float32)[None])[0]
after = np.linalg.svd(np.asarray(turned, np.float64), compute_uv=False)

fig, axes = plt.subplots(1, 3, figsize=(12, 3.5))
axes[0].semilogy(before / before.max(), label="gradient")
axes[0].semilogy(after, label="Muon's direction")
axes[0].set_xlabel("number of the singular value")
axes[0].set_ylabel("singular value\n(gradient: over its largest)")
axes[0].legend()

final = race["numbers"]["final"]
axes[1].bar(list(final), list(final.values()))
axes[1].set_ylim(3.25, 3.36)
axes[1].set_ylabel("last validation loss, nats/token\n(one run each)")

moonlight = known["A11"].measure.__globals__
compute = np.logspace(-1, 1.2, 50)
axes[2].semilogx(compute, [100 * moonlight["share"](c) for c in compute])
for n, d in moonlight["RUNS"]:
    axes[2].axvline(6 * n * d / moonlight["PFLOP_DAY"], color="gray", lw=0.8)
axes[2].axhline(52, color="gray", lw=0.8, ls="--")
axes[2].set_xlabel("AdamW's compute, PFLOP/s-days\n(lines: the fitted range)")
axes[2].set_ylabel("Muon's compute for its loss, %\n(dashed: the text's 52)")
fig.tight_layout()

# %% [markdown]
# Our own small race, both at the best of four rates on three paired seeds, is claim C5; where it
# has run, its curve is below.

# %%
own = results.read(where, known["C5"], "laptop")
if own is None:
    print("C5 has not run here: sparse-pretrain reproduce C5")
else:
    fig, ax = plt.subplots(figsize=(6, 3.5))
    for name, curve in own["numbers"]["curves, mean over seeds"].items():
        ax.plot(*np.array(curve).T, label=name)
    ax.set_xlabel("step")
    ax.set_ylabel("held-out loss, nats/byte")
    ax.legend()
    print(own["verdict"], own["measured"])

# %%
assert race["verdict"] == "PASS"
assert known["A11"].measure(bench.Bench(None)).passed
assert after.min() > 0.3
assert after.max() < 1.3
