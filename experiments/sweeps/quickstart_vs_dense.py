"""The quickstart against its dense baseline: five paired seeds, each arm at its best rate.

Question: on equal active FLOPs and equal tokens, does the mixture of experts predict held-out text
better? A seed fixes the order of the data and the initial weights both arms share.
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/quickstart_vs_dense.py
Then:     python3 experiments/results/collect.py
"""

from sparse_pretrain.scaling.combinators import param, runs


def get_sweep():
    """(experiment, overrides) of every child, the two arms of a seed next to each other."""
    arms = ("experiments/quickstart.py", "experiments/dense_baseline.py")
    pairs = zip(*(runs(a, param("seed", range(5))) for a in arms), strict=True)
    return [child for pair in pairs for child in pair]
