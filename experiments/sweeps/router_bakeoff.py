"""Every router on the same model, tokens and order of data: five paired seeds.

Question: at equal compute, which router predicts held-out text best, and which spreads its load?
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/router_bakeoff.py
Then:     python3 experiments/results/collect_routers.py
Cost:     60 runs of 1M tokens, about an hour on two cores.
Measured: see experiments/router_bakeoff.py.
"""

from sparse_pretrain.scaling.combinators import runs

# aux_loss is the baseline: the loss-free arms are held against it
ARMS = (
    "aux_loss",
    "unbalanced",
    "sign",
    "proportional",
    "quantile",
    "threshold",
    "bip",
    "sinkhorn",
    "selective",
    "auction",
    "expert_choice",
    "hash",
)


def get_sweep():
    """(experiment, overrides) of every child, all arms of a seed before the next seed."""
    return [
        child
        for seed in range(5)
        for arm in ARMS
        for child in runs(f"experiments/router_bakeoff.py:{arm}", [{"seed": seed}])
    ]
