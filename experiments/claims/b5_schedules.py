"""B5: Warm-up, stable, decay ends below cosine, and cosine below a constant rate.

Source: 2503.12811; curves of thu-yao-01-luo/MultiPowerLaw.
Published: WSD < cosine < constant at 24,000 steps.
Kind: REFIT.
Tested: the last losses of its curves at 25M, 100M and 400M parameters; one run each.
Criterion: 3/3 sizes.
Cost: under a second.
Result: PASS at bfee571: 3.277/3.304/3.347; 2.951/2.979/3.035; 2.722/2.740/2.817, 3/3.
"""

from sparse_pretrain.claims import base


def measure(bench):
    """The last losses by size and schedule."""
    from sparse_pretrain.scaling.published import schedules

    del bench
    losses = schedules.final_losses()
    wins = schedules.ordered(losses)
    text = "; ".join("/".join(f"{x:.3f}" for x in row.values()) for row in losses.values())
    return base.Outcome(
        passed=wins == len(losses) == 3, measured=f"{text}, {wins}/3", numbers=losses
    )
