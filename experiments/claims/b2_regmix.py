"""B2: A regression on many tiny runs ranks data mixtures for large ones.

Source: 2407.01492, table 2; data of sail-sg/regmix.
Published: 13 rank correlations from 96.87 to 99.77 (arXiv 99.60, Pile-CC 98.92, USPTO 99.12).
Kind: REFIT.
Tested: boosted trees fitted to 512 runs of 1M parameters, ranking 256 other mixtures of that size;
    the same trees ranking 64 runs of 1B.
Criterion: lowest, highest and the three named within 0.05; trees beat a line 13 of 13; mean over 90
    at 1B.
Cost: a minute or two.
Result: PASS at bfee571+: 96.87 to 99.77, trees ahead in 13 of 13, 94.98 at 1B.
"""

import importlib.util

from sparse_pretrain.claims import base


def measure(bench):
    """Rank correlations in percent, by domain."""
    if importlib.util.find_spec("lightgbm") is None:
        raise base.NotRun("needs lightgbm, which the extra 'published' installs")
    from sparse_pretrain.scaling.published import regmix

    del bench
    found = regmix.refit()
    off = [found["by_domain"][d]["boosted"] - p for d, p in regmix.PUBLISHED.items()]
    off += [found["lowest"] - regmix.LOWEST, found["highest"] - regmix.HIGHEST]
    wins, domains = found["boosted_wins"], found["domains"]
    passed = max(map(abs, off)) <= 0.05 and wins == domains == 13 and found["mean_1B"] > 90
    return base.Outcome(
        passed=passed,
        measured=f"{found['lowest']:.2f} to {found['highest']:.2f}, trees ahead in {wins} of "
        f"{domains}, {found['mean_1B']:.2f} at 1B",
        numbers=found | {"largest difference": max(map(abs, off))},
    )
