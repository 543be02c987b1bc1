"""C9: DoReMi's game equalises what is left to learn, and helps the worst domain.

Source: 2305.10429, algorithm 1 and section 3.
Published: 2.6 times fewer steps and +6.5 points, out of reach here.
Kind: DIRECTION.
Tested: nothing yet.
Criterion: excess losses equal to 1e-3 on a known law; on four real domains the worst domain not
    above uniform, 3 seeds.
Cost: unknown.
Result: mixtures weighted by a game are not in the data pipeline yet
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Waits for games/mixtures and data/mixture."""
    raise base.NotRun("mixtures weighted by a game are not in the data pipeline yet")
