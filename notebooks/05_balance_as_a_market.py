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
# # Balancing without an auxiliary loss, as a market
#
# **Install** `python3 -m pip install -e '.[notebooks]'`. **Time** half a minute.
#
# Tokens bid their router scores, experts charge prices, every token buys the k experts with the
# highest score less price. DeepSeek's bias is minus the price, moved by the sign of the excess
# demand: sign descent on the dual of an assignment problem. Other rules are other descents.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sparse_pretrain.games import prices

EXPERTS, TOP, TOKENS, STEPS = 16, 2, 2048, 400
taste = np.linspace(0.35, -0.35, EXPERTS)  # some experts are liked by all


def bids(step):
    """Scores of a batch, sigmoids of noise and taste; fresh tokens every step."""
    noise = np.random.default_rng(step).normal(size=(TOKENS, EXPERTS))
    return jax.nn.sigmoid(jnp.asarray(noise + 2 * taste, jnp.float32))


valid = jnp.ones(TOKENS, bool)


@jax.jit
def demand(score, price):
    """Pairs per expert."""
    chosen = jax.lax.top_k(score - price[None], TOP)[1]
    return jnp.zeros(EXPERTS).at[chosen.reshape(-1)].add(1.0)


rules = {
    "sign, 0.001": lambda price, load, score: -prices.sign(-price, load, 0.001),
    "sign, 0.01": lambda price, load, score: -prices.sign(-price, load, 0.01),
    "proportional, 0.01": lambda price, load, score: -prices.proportional(-price, load, 0.01),
    "quantile": lambda price, load, score: prices.quantile(score, price, TOP, valid),
}
paths, violation = {}, {}
for name, rule in rules.items():
    price, kept, worst = jnp.zeros(EXPERTS), [], []
    move = jax.jit(rule)
    for step in range(STEPS):
        score = bids(step)
        load = demand(score, price)
        kept.append(np.asarray(price))
        worst.append(float(prices.max_violation(load)))
        price = move(price, load, score)
    paths[name], violation[name] = np.array(kept), np.array(worst)

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6))
for ax, name in zip(axes, ("sign, 0.001", "quantile"), strict=False):
    ax.plot(paths[name], lw=0.9)
    ax.set_title(f"prices under {name}")
    ax.set_xlabel("step")
    ax.set_ylabel("price of each expert, score units")
for name, worst in violation.items():
    axes[2].semilogy(np.convolve(worst, np.ones(10) / 10, "valid"), label=name)
axes[2].set_xlabel("step")
axes[2].set_ylabel("MaxVio of a batch, mean of 10")
axes[2].legend()
fig.tight_layout()

# %% [markdown]
# All rules walk to the same prices. The sign rule walks at a fixed speed and then trembles, the
# quantile jumps there in one batch. At these prices nobody gains by another allocation: the dual
# bound meets what the balanced market earns.

# %%
score = bids(10_000)
ends = {name: path[-1] - path[-1].mean() for name, path in paths.items()}
bound = {name: float(prices.dual(score, jnp.asarray(p), TOP, valid)) for name, p in ends.items()}
start = float(prices.dual(score, jnp.zeros(EXPERTS), TOP, valid))
print(f"dual without prices {start:.4f}, with them", {n: round(b, 4) for n, b in bound.items()})
late = {name: worst[-50:].mean() for name, worst in violation.items()}
print("MaxVio late", {name: round(v, 3) for name, v in late.items()})

# %%
first = np.mean([v[0] for v in violation.values()])
assert all(v < first / 5 for v in late.values()), "every rule cuts MaxVio five times"
assert all(b < start for b in bound.values()), "prices lower the dual"
spread = np.ptp(np.array([ends["sign, 0.001"], ends["quantile"]]), axis=0).max()
assert spread < 0.05, "the rules agree on the prices"
