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
# # Latent attention and the table of caches
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** half a minute.
#
# What a token leaves behind decides how long a context a GPU can serve. Grouped queries divide the
# heads; latent attention keeps one small vector and one rotary key for all heads; compressed
# attention keeps one entry for many tokens.

# %%
import matplotlib.pyplot as plt

from sparse_pretrain.claims import base, bench, models
from sparse_pretrain.planning import flops

names = ["Llama-3.1-405B", "Qwen2.5-72B", "Llama-3-8B", "Qwen3-30B-A3B", "DeepSeek-V3"]
held = {name: flops.kv_bytes_per_token(models.MODELS[name]()) for name in names}
known = base.load()
v4 = known["A17"].measure(bench.Bench(None)).numbers["bytes per token"]
held |= {"DeepSeek-V3.2, FP8": v4["V3.2"], "V4-Pro": v4["Pro"], "V4-Flash": v4["Flash"]}

fig, ax = plt.subplots(figsize=(8, 3.6))
ax.barh(list(held), [n / 1000 for n in held.values()])
ax.set_xscale("log")
ax.set_xlabel("cache, KB a token (1 KB = 1000 bytes)")
ax.invert_yaxis()
for i, n in enumerate(held.values()):
    ax.text(n / 1000 * 1.05, i, f"{n / 1000:.1f}", va="center")
ax.set_xlim(1, 1500)
fig.tight_layout()

# %% [markdown]
# Absorbed, the projections of keys and values move to the query and the output, and all heads read
# the latent itself. The two forms are one function: our decoder runs one, training the other, and
# DSA that chooses everything is a third way to the same numbers.

# %%
found = known["A13"].measure(bench.Bench(None))
print(found.measured)

# %%
table = known["A3"].measure(bench.Bench(None))
print(table.measured, "-", table.analysis)
assert found.passed
assert table.passed
assert known["A17"].measure(bench.Bench(None)).passed
