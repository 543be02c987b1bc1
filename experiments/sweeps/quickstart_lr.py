"""Learning rate of the quickstart and of its dense baseline: the same three trials for each.

Question: at which peak rate is each arm best? One seed that the comparison does not use.
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/quickstart_lr.py
"""

from sparse_pretrain.scaling.combinators import param, prod, runs


def get_sweep():
    """(experiment, overrides) of every child."""
    rates = prod(param("seed", [100]), param("optim.lr", [0.007, 0.014, 0.028]))
    arms = ("experiments/quickstart.py", "experiments/dense_baseline.py")
    return [child for pair in zip(*(runs(a, rates) for a in arms), strict=True) for child in pair]
