"""B7: A fit to models of few experts forecasts models of 512.

Source: none, this is new; runs of google-deepmind/scaling_laws_for_routing.
Published: none.
Kind: REFIT.
Tested: our efficiency-leverage fit to the runs of fewer experts, on the runs of 512 left out.
Criterion: every held-out run within 1 %.
Cost: seconds.
Result: PASS at bfee571: at worst S-Base 0.84 %, RL-R 0.98 %, Hash 0.89 %.
"""

from sparse_pretrain.claims import base


def measure(bench):
    """The error of every held-out run, by router."""
    from sparse_pretrain.scaling.published import routed

    del bench
    found = {router: routed.planner(router) for router in routed.ROUTERS}
    worst = {router: f["worst"] for router, f in found.items()}
    return base.Outcome(
        passed=max(worst.values()) < 1.0,
        measured="at worst " + ", ".join(f"{r} {w:.2f} %" for r, w in worst.items()),
        numbers=found,
    )
