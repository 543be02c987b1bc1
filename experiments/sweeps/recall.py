"""Recall and needles over 2,048 tokens under every attention.

Question: which sparse attention finds what lies further back than its window, within a budget of at
most a quarter of the context?
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/recall.py
Then:     python3 experiments/results/collect_recall.py
Measured: see experiments/recall.py.
"""

from sparse_pretrain.scaling.combinators import runs

TASKS = ("recall", "needle")
# full attention is the reference, sliding the one that must fail
KINDS = ("full", "sliding", "dsa", "csa", "nsa", "moba")
SEEDS = (0, 1)


def get_sweep():
    """(experiment, overrides) of every child, all of a seed before the next seed."""
    return [
        child
        for seed in SEEDS
        for task in TASKS
        for kind in KINDS
        for child in runs(f"experiments/recall.py:{task},{kind}", [{"seed": seed}])
    ]
