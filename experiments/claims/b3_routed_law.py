"""B3: The scaling law of routed models.

Source: 2202.01169, table 3 and section 5; data of google-deepmind/scaling_laws_for_routing.
Published: S-Base a -0.082, b -0.108, c 0.009, cut-off 937B; RL-R -0.083, -0.126, 0.012, 85B; Hash
    -0.087, -0.136, 0.012, 83B.
Kind: REFIT.
Tested: the law in log size and log effective experts, fitted to the runs of each router.
Criterion: a within 0.002, b 0.012, c 0.001, cut-offs 20 %.
Cost: seconds.
Result: PASS at bfee571: S-Base -0.083, -0.118, 0.0099, 783B; RL-R -0.083, -0.123, 0.0112, 97B; Hash
    -0.087, -0.138, 0.0126, 89B.
"""

from sparse_pretrain.claims import base

WITHIN = {"a": 0.002, "b": 0.012, "c": 0.001}


def measure(bench):
    """a, b, c and the cut-off of every router."""
    from sparse_pretrain.scaling.published import routed

    del bench
    found = {router: routed.refit(router) for router in routed.ROUTERS}
    passed = all(
        abs(found[r][k] - told[k]) <= within
        for r, told in routed.PUBLISHED.items()
        for k, within in WITHIN.items()
    )
    ratios = {r: found[r]["cutoff"] / told["cutoff"] for r, told in routed.PUBLISHED.items()}
    text = "; ".join(
        f"{r} {f['a']:.3f}, {f['b']:.3f}, {f['c']:.4f}, {f['cutoff'] / 1e9:.0f}B"
        for r, f in found.items()
    )
    return base.Outcome(
        passed=passed and all(abs(x - 1) <= 0.2 for x in ratios.values()),
        measured=text,
        numbers=found,
    )
