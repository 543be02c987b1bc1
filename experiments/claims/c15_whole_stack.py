"""C15: Quality from algorithms: this codebase's stack against a GPT-2-like one, both tuned.

Source: the founding thesis of this codebase; nanoGPT's recipe as the other side.
Published: none.
Kind: DIRECTION.
Tested: nothing yet.
Criterion: FLOPs to equal held-out loss at least 3 times fewer, interval given.
Cost: an hour of one core.
Result: the tuning of both stacks has not been run
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Waits for the runs."""
    raise base.NotRun("the tuning of both stacks has not been run")
