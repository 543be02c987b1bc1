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
# # How much compute a mixture of experts saves
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** ten seconds.
#
# The law of routed models (2202.01169), refitted to its published runs by
# `sparse-pretrain reproduce B3`, says how much larger a dense model would have to be. Its saving
# shrinks with size until a cut-off, which is why later work made experts small and many. C4 is our
# own look at that at a few hundred thousand parameters.

# %%
import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain.claims import base, results

known, where = base.load(), results.folder()
routed = results.read(where, known["B3"], "laptop")
fine = results.read(where, known["C4"], "laptop")
if routed is None or fine is None:
    raise SystemExit("run sparse-pretrain reproduce B3 C4 first")


def leverage(law, size, experts):
    """The size of the dense model of equal loss, over `size`."""

    def saturate(e):
        start, limit = law["E_start"], law["E_max"]
        return 1 / (1 / (e - 1 + 1 / (1 / start - 1 / limit)) + 1 / limit)

    gain = np.log10(saturate(experts) / saturate(1.0))
    return 10 ** ((law["b"] + law["c"] * np.log10(size)) * gain / law["a"])


sizes = np.logspace(7.5, 12, 60)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for router, law in routed["numbers"].items():
    left.semilogx(sizes, leverage(law, sizes, 512.0), label=router)
left.axhline(1, color="black", lw=0.8)
left.set_xlabel("parameters that a token uses")
left.set_ylabel("dense size of equal loss, times larger")
left.set_title("512 experts, one chosen")
left.legend()

losses = fine["numbers"]["nats per byte by seed"]
for seed in range(len(losses["8 top-1"])):
    right.plot([0, 1], [losses[arm][seed] for arm in losses], "o-", color="tab:blue")
right.set_xticks([0, 1], list(losses))
right.set_xlim(-0.3, 1.3)
right.set_ylabel("held-out loss, nats/byte")
right.set_title("the same active width, three paired seeds")
fig.tight_layout()
value, low, high = fine["interval"]
print(f"many small experts gain {value:.3f} nats/byte [{low:.3f}, {high:.3f}]")
print("and counting 4-grams scores", round(fine["numbers"]["4-gram Witten-Bell, nats per byte"], 3))

# %%
assert routed["verdict"] == "PASS"
assert fine["verdict"] == "PASS"
assert low > 0
law = routed["numbers"]["S-Base"]
assert leverage(law, 1e8, 512.0) > leverage(law, 1e10, 512.0) > 1, "it shrinks with size"
