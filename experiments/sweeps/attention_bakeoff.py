"""Every attention on the same model, tokens and order of data: five paired seeds.

Question: what does reading a quarter of the context cost, and how much of what full attention gains
beyond position 1,024 does each arm recover?
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/attention_bakeoff.py
Then:     python3 experiments/results/collect_attention.py
Cost:     see experiments/attention_bakeoff.py.
Measured: see experiments/attention_bakeoff.py.
"""

from sparse_pretrain import attention
from sparse_pretrain.scaling.combinators import runs

# full is the baseline; what this version has no attention for is left out
ARMS = ("full", "sliding", "moba", "nsa", "mla", "dsa", "csa", "hca")


def get_sweep():
    """(experiment, overrides) of every child, all arms of a seed before the next seed."""
    return [
        child
        for seed in range(5)
        for arm in ARMS
        if arm in attention.TABLE
        for child in runs(f"experiments/attention_bakeoff.py:{arm}", [{"seed": seed}])
    ]
