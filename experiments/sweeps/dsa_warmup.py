"""DSA's sparse stage against going on with dense attention: five paired seeds.

Question: what does reading an eighth of the row cost in bits/byte?
Command:  sparse-pretrain sweep --sweep=experiments/sweeps/dsa_warmup.py
Measured: see experiments/dsa_warmup.py.
"""

from sparse_pretrain.scaling.combinators import runs


def get_sweep():
    """(experiment, overrides) of every child, both arms of a seed before the next seed."""
    return [
        child
        for seed in range(5)
        for arm in ("sparse", "dense")
        for child in runs(f"experiments/dsa_warmup.py:{arm}", [{"seed": seed}])
    ]
