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
# # Where experts live
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** ten seconds.
#
# A layer waits for its busiest device. Given past loads, EPLB copies the busiest experts and packs
# the copies so that devices are nearly level. This is its worked example, then a layer of 64
# experts with Zipf loads.

# %%
import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain.claims import base, bench
from sparse_pretrain.sharding import placement

known = base.load()
example = known["A8"].measure(bench.Bench(None))
print(example.measured)
loads = known["A8"].measure.__globals__["LOADS"]
placed = placement.rebalance_experts(loads, 16, 4, 2, 8)

fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for ax, layer in zip(axes, range(2), strict=True):
    share = loads[layer] / placed.logcnt[layer]
    bottom = np.zeros(8)
    for place in range(2):
        expert = placed.phy2log[layer].reshape(8, 2)[:, place]
        ax.bar(range(8), share[expert], bottom=bottom)
        for device in range(8):
            middle = bottom[device] + share[expert[device]] / 2
            ax.text(device, middle, str(expert[device]), ha="center", va="center", color="white")
        bottom += share[expert]
    ax.axhline(loads[layer].sum() / 8, color="black", lw=0.8, ls="--")
    ax.set_xlabel("device")
    ax.set_title(f"layer {layer}: experts by number")
axes[0].set_ylabel("load, tokens (dashed: the mean)")
fig.tight_layout()

# %%
rng = np.random.default_rng(0)
devices, experts = 8, 64
seen = rng.permuted(np.arange(1, experts + 1) ** -0.9 * 1e4, out=None)[None]
worst = {}
for copies in (0, 8, 16, 32, 64):
    got = placement.rebalance_experts(seen, experts + copies, 1, 1, devices)
    level = placement.device_loads(seen, got, devices)
    worst[copies] = float(level.max() / level.mean())
plain = seen.reshape(devices, -1).sum(1)
worst_plain = float(plain.max() / plain.mean())

fig, ax = plt.subplots(figsize=(6, 3.4))
ax.axhline(worst_plain, color="gray", ls="--", label="experts in order")
ax.plot(list(worst), list(worst.values()), "o-", label="EPLB")
ax.axhline(1, color="black", lw=0.8)
ax.set_xlabel("copies beyond one of each of 64 experts")
ax.set_ylabel("busiest device over the mean")
ax.legend()
fig.tight_layout()

# %%
assert example.passed
assert worst[8] < worst_plain
assert worst[64] < 1.05, "with a copy for every expert the devices are level"
