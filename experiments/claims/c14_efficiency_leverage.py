"""C14: A mixture's advantage grows with sparsity and compute.

Source: 2507.17702, equation of efficiency leverage.
Published: its law extrapolates to 1.06 to 1.3 times at 2e14 FLOPs.
Kind: DIRECTION.
Tested: nothing yet.
Criterion: own iso-FLOP runs at four budgets: lower 95 % bound above 1 at the largest, printed
    beside the law's value.
Cost: hours of one core.
Result: the iso-FLOP runs of four budgets have not been made
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Waits for iso-FLOP runs."""
    raise base.NotRun("the iso-FLOP runs of four budgets have not been made")
