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
# # Anatomy of a DeepSeek-V3 step
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** ten seconds.
#
# Where 671 billion parameters are, where 250 GFLOP a token go, what a step would hold in memory,
# and how 2.788 million GPU hours become $5.576M. Nothing is allocated: the model is abstract.

# %%
import math

import jax
import matplotlib.pyplot as plt

from sparse_pretrain.claims import base, bench, models
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, flops

config = models.MODELS["DeepSeek-V3"]()
shapes = lm.define(config).shapes
parts = dict.fromkeys(
    ("routed experts", "attention", "shared experts", "embedding and head", "dense layers", "rest"),
    0,
)
for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    keys, size = [key.key for key in path], math.prod(leaf.shape)
    if keys[0] in ("embedding", "head"):
        parts["embedding and head"] += size
    elif "attention" in keys:
        parts["attention"] += size
    elif "shared" in keys:
        parts["shared experts"] += size
    elif "mlp" in keys:
        parts["dense layers"] += size
    elif keys[-1] in ("w_gate", "w_up", "w_down"):
        parts["routed experts"] += size
    else:
        parts["rest"] += size
total = sum(parts.values())
active = parts | {"routed experts": parts["routed experts"] * 8 // 256}

# %%
lengths = [1024, 4096, 16_384, 65_536, 131_072]
works = [lm.work_per_token(config, length) for length in lengths]
linear = [3 * w.linear / 1e9 for w in works]
core = [3 * w.core_model / 1e9 for w in works]

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
names = list(parts)
left.barh(names, [parts[n] / 1e9 for n in names], color="lightgray", label="held")
left.barh(names, [active[n] / 1e9 for n in names], color="tab:blue", label="active for a token")
left.set_xscale("log")
left.set_xlabel("parameters, billions")
left.invert_yaxis()
left.legend()
right.stackplot(lengths, linear, core, labels=["products with weights", "attention core"])
right.set_xscale("log")
right.set_xlabel("context, tokens")
right.set_ylabel("training work, GFLOP/token")
right.legend(loc="upper left")
fig.tight_layout()

# %% [markdown]
# Held in bytes: float32 masters and two Adam moments are 12 bytes a parameter before any
# activation, so the state alone needs a cluster.

# %%
state = 12 * total / 1e12
print(
    f"{total:,} parameters; {state:.1f} TB of masters and moments: {state * 1e12 / 80e9:.0f} GPUs"
)
each = flops.train_flops_per_token(config, 4096).model
hours = {"pre-training": 2664e3, "context": 119e3, "post-training": 5e3}
rate = each * 14.8e12 / (hours["pre-training"] * 3600)
print(f"{each / 1e9:.1f} GFLOP a token, {each * 14.8e12:.2e} in all")
print(f"{rate / 1e12:.0f} TFLOP/s a GPU, {100 * rate / chips.CHIPS['h800'].bf16:.0f} % of bfloat16")
print(f"{sum(hours.values()) / 1e3:.0f}K hours at $2: ${sum(hours.values()) * 2 / 1e6:.3f}M")

# %%
known = base.load()
for id in ("A1", "A4", "A5"):
    found = known[id].measure(bench.Bench(None))
    print(id, found.measured)
    assert found.passed
assert total + 58 * 256 == 671_026_419_200
