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
# # A tour: from a configuration to a verdict
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** half a minute, no accelerator.
#
# A configuration is a Python file; everything that follows from it is known before a run. Here a
# sparse quickstart meets a dense baseline: what they hold, what a token costs, and what the
# committed runs measured.

# %%
import dataclasses
import json

import matplotlib.pyplot as plt

from sparse_pretrain import config
from sparse_pretrain.claims import base, ledger, results
from sparse_pretrain.planning import flops

arms = {name: config.resolve(name) for name in ("quickstart", "dense_baseline")}
models = {n: dataclasses.replace(arm.model, vocab=4096) for n, arm in arms.items()}
counts = {name: flops.parameters(model) for name, model in models.items()}
work = {name: flops.train_flops_per_token(model, 256).model for name, model in models.items()}
for name in arms:
    total, active = counts[name].total / 1e6, counts[name].active / 1e6
    print(f"{name:15} {total:6.2f}M parameters, {active:.2f}M active, {work[name] / 1e6:.1f} MFLOP")

# %% [markdown]
# The mixture holds several times the parameters at the same work per token. Does that buy
# anything? Five paired seeds, each arm at the best of eight trials, are in the repository.

# %%
rows = json.loads((base.folder().parent / "results/quickstart_vs_dense.json").read_text())["rows"]
losses = {}
for row in rows:
    arm = "quickstart" if "quickstart" in row["arm"] else "dense_baseline"
    losses.setdefault(arm, {})[row["seed"]] = row["bits_per_byte"]
seeds = sorted(losses["quickstart"])
gaps = [losses["quickstart"][s] - losses["dense_baseline"][s] for s in seeds]

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for name in arms:
    left.bar(name, counts[name].total / 1e6, color="lightgray")
    left.bar(name, counts[name].active / 1e6, color="tab:blue")
left.set_ylabel("parameters, millions (blue: active)")
right.axhline(0, color="black", lw=0.8)
right.plot(seeds, gaps, "o")
right.set_xticks(seeds)
right.set_xlabel("seed")
right.set_ylabel("mixture less dense, bits/byte")
fig.tight_layout()

# %% [markdown]
# Every claim that this codebase repeats from a paper has a row in a ledger, with the rule fixed
# beforehand.

# %%
table = ledger.rows(base.load(), results.folder())
for row in table:
    print(f"{row.id:4} {row.verdict:8} {row.claim}")
print(ledger.counts(table))

# %%
assert len(gaps) == 5
assert max(gaps) < 0, "the mixture is ahead on every seed"
assert all(row.verdict == "PASS" for row in table if row.id.startswith("A"))
