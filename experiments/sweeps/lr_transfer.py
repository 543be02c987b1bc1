"""Learning rates on a grid of square roots of 2, widths 64 to 512, transfer on and off.

Question, record and a faster way to the same numbers: experiments/lr_transfer.py.
Command: sparse-pretrain sweep --sweep=experiments/sweeps/lr_transfer.py
"""

from sparse_pretrain.scaling.combinators import param, prod, runs

WIDTHS = (64, 128, 256, 512)
# exponents of sqrt(2): each arm's best lies inside its own range, at every width
RANGES = {"on": range(-17, -6), "off": range(-20, -6)}


def get_sweep():
    """(experiment, overrides) of every child."""
    return [
        child
        for transfer, exponents in RANGES.items()
        for width in WIDTHS
        for child in runs(
            f"experiments/lr_transfer.py:width={width},transfer={transfer}",
            prod(param("seed", [0]), param("optim.lr", [2.0 ** (e / 2) for e in exponents])),
        )
    ]
