"""C14: A mixture's advantage grows with sparsity and compute.

Source: 2507.17702, equation 7 and table 4.
Published: its law extrapolates to 1.06 to 1.3 times at 2e14 FLOPs.
Kind: DIRECTION.
Tested: our own iso-FLOP runs of dense models and mixtures of equal FLOPs per token
    (experiments/isoflop.py, `sparse-pretrain isoflop`), four budgets or more, a law fitted to each;
    the compute that the dense law needs for the mixture's best loss, over the mixture's. They are
    committed and this reads them.
Criterion: own iso-FLOP runs at four budgets: lower 95 % bound above 1 at the largest, printed
    beside the law's value.
Cost: hours of one core.
Result: PASS at aaec7e0: 1.86 at 8e+11 FLOPs, the published law's value there 0.77.
"""

import json

from sparse_pretrain.claims import base, results


def measure(bench):
    """The leverage at every budget, with the published law's."""
    file = results.folder().parent / "isoflop.json"
    if not file.exists():
        raise base.NotRun(
            "its iso-FLOP runs are not among the committed results "
            "(experiments/results/isoflop.json)"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    budgets = sorted({row["budget"] for row in record["rows"]})
    if len(budgets) < 4 or not record["leverage"]:
        raise base.NotRun(
            f"{file.name} has {len(budgets)} budgets and no law for each arm; needs 4"
        )
    for row in record["rows"]:
        bench.flops += row["flops"]
        bench.seconds += row["seconds"]
        bench.commits.add(row["commit"])
    (found,) = record["leverage"].values()
    last = max(found, key=lambda at: at["flops"])
    low, high = last["interval"]
    law = {f"{at['flops']:.3g}": at["published_law"] for at in found}
    return base.Outcome(
        passed=low is not None and low > 1,
        measured=f"{last['leverage']:.2f} at {last['flops']:.2g} FLOPs, the published law's value "
        f"there {last['published_law']:.2f}",
        interval=(last["leverage"], low, high),
        of="the leverage at the largest budget",
        numbers={
            "leverage": {f"{at['flops']:.3g}": [at["leverage"], *at["interval"]] for at in found},
            "published law, extrapolated": law,
            "runs": len(record["rows"]),
        },
        analysis="The runs have one seed and one rate; the interval is of refits. The published "
        "law was fitted to 3e18 to 3e20 FLOPs.",
    )
