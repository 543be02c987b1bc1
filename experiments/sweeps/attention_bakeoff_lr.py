"""The learning rate of each arm of the attention bake-off: as many trials for every arm.

Question: which peak rate suits each attention? Half the tokens, and a seed that the bake-off does
not use. Where an arm's best rate is the first or the last, give RATES one more for all arms.
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/attention_bakeoff_lr.py
Then:     python3 experiments/results/collect_attention.py runs/attention_bakeoff_lr, and its last
          line is RATES of experiments/attention_bakeoff.py.
Measured: see experiments/attention_bakeoff.py.
"""

from sparse_pretrain import attention
from sparse_pretrain.scaling.combinators import param, prod, runs

ARMS = ("full", "sliding", "moba", "nsa", "mla", "dsa", "csa", "hca")
RATES = (0.005, 0.01, 0.02, 0.04)


def get_sweep():
    """(experiment, overrides) of every child."""
    fixed = prod(param("seed", [100]), param("tokens", [400_000]))
    trials = prod(fixed, param("optim.lr", RATES))
    return [
        child
        for arm in ARMS
        if arm in attention.TABLE
        for child in runs(f"experiments/attention_bakeoff.py:{arm}", trials)
    ]
