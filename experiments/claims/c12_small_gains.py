"""C12: Multi-token prediction, hyper-connections, Engram and shared experts: gains at scale.

Source: 2412.19437, table 4; 2512.24880; 2601.07372; 2401.06066.
Published: gains at 1B parameters and more.
Kind: DIRECTION.
Tested: nothing yet.
Criterion: none: sign and size with intervals are reported.
Cost: unknown.
Result: hyper-connections and Engram are not in the model yet
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Waits for the modules."""
    raise base.NotRun("hyper-connections and Engram are not in the model yet")
