"""C10: The best learning rate stays where it is as the model grows, under muP.

Source: 2203.03466, figure 1.
Published: stable over width with muP, shifting without.
Kind: DIRECTION.
Tested: nothing yet.
Criterion: shift at most one factor of 2 with, two or more without, widths 64 to 512; coordinate
    slopes below 0.1.
Cost: unknown.
Result: the muP parametrisation was not on main when this ledger was made
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Waits for muP."""
    raise base.NotRun("the muP parametrisation was not on main when this ledger was made")
