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
# # Chinchilla, refitted, and Kaplan explained by it
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** ten seconds; the refit itself is
# `sparse-pretrain reproduce B1` and takes half a minute once its public file is there.
#
# The law that sized a generation of models was fitted to points that were later read off its own
# figure. The refit is committed as five numbers with bootstrap intervals; this draws what they say.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain.claims import base, bench, results

known = base.load()
fit = results.read(results.folder(), known["B1"], "laptop")
if fit is None:
    raise SystemExit("run sparse-pretrain reproduce B1 first")
numbers = fit["numbers"]
print(json.dumps({k: numbers[k] for k in ("A", "B", "E", "alpha", "beta")}, indent=1))
print("95 % intervals", {k: np.round(v, 3).tolist() for k, v in numbers["intervals"].items()})


def best(law, flops):
    """(parameters, tokens) of the lowest loss at this budget."""
    a, b, alpha, beta = law
    n = np.logspace(6, 13, 4000)
    loss = a / n**alpha + b / (flops / (6 * n)) ** beta
    at = int(loss.argmin())
    return n[at], flops / (6 * n[at])


laws = {
    "refit here": tuple(numbers[k] for k in ("A", "B", "alpha", "beta")),
    "as published in 2022": (406.4, 410.7, 0.34, 0.28),
}
budgets = np.logspace(18, 26, 33)
fig, left = plt.subplots(figsize=(6, 3.6))
for name, law in laws.items():
    ratio = [d / n for n, d in (best(law, c) for c in budgets)]
    left.loglog(budgets, ratio, label=name)
left.axvline(5.76e23, color="gray", lw=0.8)
left.axhline(20, color="gray", lw=0.8, ls="--")
left.set_xlabel("compute, FLOPs (line: Chinchilla's)")
left.set_ylabel("tokens per parameter at the optimum")
left.legend()
fig.tight_layout()

# %% [markdown]
# Kaplan had found that parameters grow as compute to the 0.73. Count parameters without embeddings
# at sizes where embeddings dominate, and Chinchilla's own law gives that exponent.

# %%
kaplan = known["A15"]
exponent = kaplan.measure.__globals__["exponent"]
omegas = np.linspace(0, 60_000, 25)
law = kaplan.measure.__globals__["LAWS"]["refit"]
fig, right = plt.subplots(figsize=(6, 3.6))
right.plot(omegas, [exponent(law, w) for w in omegas])
right.axhline(0.73, color="gray", lw=0.8, ls="--")
right.plot([47_491], [exponent(law, 47_491)], "o")
right.set_xlabel("weight of embeddings, N + w N^(1/3) (dot: as fitted)")
right.set_ylabel("exponent of parameters in compute\n(dashed: Kaplan's)")
fig.tight_layout()

# %%
assert fit["verdict"] == "PASS"
assert abs(numbers["alpha"] - 0.347313) < 1e-4
assert abs(numbers["tokens_per_param"] - 17.9) < 0.05
assert kaplan.measure(bench.Bench(None)).passed
