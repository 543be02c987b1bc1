"""The learning rate that all arms of the router bake-off share, found on two of them.

Question: which peak rate suits this model, and is it the same under a balance loss and prices?
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/router_bakeoff_lr.py
Then:     python3 experiments/results/collect_routers.py runs/router_bakeoff_lr
Measured: see experiments/router_bakeoff.py.
"""

from sparse_pretrain.scaling.combinators import chain, param, prod, runs

MEMORY = "model.blocks.moe.ffn.router.memory"


def get_sweep():
    """(experiment, overrides) of every child; quantile's memory once more at the new rate."""
    fixed = prod(param("seed", [100]), param("tokens", [500_000]))
    rates = prod(fixed, param("optim.lr", (0.014, 0.02, 0.028, 0.04)))
    memory = prod(fixed, param("optim.lr", (0.02,)), param(MEMORY, (0.98,)))
    return [
        *runs("experiments/router_bakeoff.py:quantile", chain(rates, memory)),
        *runs("experiments/router_bakeoff.py:aux_loss", rates),
    ]
