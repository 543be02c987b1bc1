"""Three settings of every router, on a seed that the bake-off does not use and half its tokens.

Question: which setting should each arm of experiments/router_bakeoff.py have?
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/router_bakeoff_tuning.py
Then:     python3 experiments/results/collect_routers.py runs/router_bakeoff_tuning
Rule:     the lowest held-out bits/byte; among settings within 0.002 of it, the lowest MaxVio.
Measured: see experiments/router_bakeoff.py.
"""

from sparse_pretrain.scaling.combinators import param, prod, runs

ROUTER = "model.blocks.moe.ffn.router."
# hash and unbalanced have no setting of their own: their three trials are of the learning rate
TRIALS = {
    "aux_loss": (ROUTER + "aux", (0.003, 0.01, 0.03)),
    "unbalanced": ("optim.lr", (0.007, 0.01, 0.014)),
    "sign": (ROUTER + "rate", (0.003, 0.01, 0.03)),
    "proportional": (ROUTER + "rate", (0.01, 0.03, 0.1)),
    "quantile": (ROUTER + "memory", (0.0, 0.5, 0.9)),
    "threshold": (ROUTER + "memory", (0.5, 0.9, 0.97)),
    "bip": (ROUTER + "iterations", (2, 4, 8)),
    "sinkhorn": (ROUTER + "temperature", (0.02, 0.05, 0.15)),
    "selective": (ROUTER + "share", (0.01, 0.1, 0.5)),
    "auction": (ROUTER + "epsilon", (0.005, 0.02, 0.05)),
    "expert_choice": (ROUTER + "score", ("softmax", "sigmoid", "sqrt_softplus")),
    "hash": ("optim.lr", (0.007, 0.01, 0.014)),
}


def get_sweep():
    """(experiment, overrides) of every child."""
    fixed = prod(param("seed", [100]), param("tokens", [500_000]))
    return [
        child
        for arm, (key, values) in TRIALS.items()
        for child in runs(f"experiments/router_bakeoff.py:{arm}", prod(fixed, param(key, values)))
    ]
