"""Learning rate of the quickstart and of its dense baseline: eight trials for each.

Question: at which peak rate is each arm best? One seed that the comparison does not use. Five rates
are the same for both. The baseline has three more, since the quickstart had three trials of its
router before (its rate, and two scales).
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/quickstart_lr.py
Then:     python3 experiments/results/collect.py runs/quickstart_lr
"""

from sparse_pretrain.scaling.combinators import param, prod, runs

BOTH = (0.0035, 0.005, 0.007, 0.01, 0.014)
BASELINE = (0.006, 0.0085, 0.012)


def get_sweep():
    """(experiment, overrides) of every child."""
    seed = param("seed", [100])
    arms = {
        "experiments/quickstart.py": BOTH,
        "experiments/dense_baseline.py": BOTH + BASELINE,
    }
    return [
        child
        for arm, rates in arms.items()
        for child in runs(arm, prod(seed, param("optim.lr", rates)))
    ]
