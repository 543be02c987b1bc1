"""C13: A schedule that is constant and then decays is as good as a cosine.

Source: 2404.06395, section 4; 2405.18392, section 3.
Published: about equal at the same number of steps, with a decay of 10 to 20 %.
Kind: DIRECTION.
Tested: a dense decoder of 2 layers and width 64, 1.2M bytes of the Python library, Muon; 5 %
    warm-up, WSD with 20 % decay by 1 - sqrt to 0 against cosine to 0; the same three rates for each
    on a seed of their own, and more in steps of two while a best one is at the edge; best against
    best on eight paired seeds. A first run, of 0.3M bytes and a grid that ended at 0.04, the best
    of both, gave -0.0855 and missed; its pairs differed by 0.017 (standard deviation), so that
    eight of them could not have bounded a difference by 0.01.
Criterion: difference below 0.01 nats/byte: the one-sided 95 % bounds on both sides inside it.
Cost: 22 runs and two for every rate added, minutes.
Result: FAIL at 5f72ef5: WSD less cosine +0.0127 nats/byte, at most 0.0254 apart.
"""

import numpy as np
from scipy import special

from sparse_pretrain.claims import arms, base
from sparse_pretrain.report import stats

SEEDS = tuple(range(8))
RATES = (0.01, 0.02, 0.04)
SCHEDULES = {
    "wsd": dict(kind="wsd", warmup=0.05, decay=0.2, shape="1-sqrt", final=0.0),
    "cosine": dict(kind="cosine", warmup=0.05, final=0.0),
}
MARGIN = 0.01


def measure(bench):
    """The sweeps, then the pairs."""
    task, steps = arms.text(), bench.size(600, 10_000)
    width = bench.size(arms.WIDTH, 512)
    made = [
        arms.Arm(name, task, arms.model(width=width), steps=steps, schedule=schedule)
        for name, schedule in SCHEDULES.items()
    ]
    best, swept, inside = arms.tuned(bench, made, [RATES] * len(made))
    losses = {
        arm.label: [arm.run(bench, seed, rate=rate)["loss"] for seed in SEEDS]
        for arm, rate in zip(made, best, strict=True)
    }
    gap = stats.paired(losses["wsd"], losses["cosine"])
    # the interval's half width is t(0.975) standard errors; a one-sided bound has t(0.95)
    n = len(SEEDS) - 1
    half = (gap.high - gap.mean) * special.stdtrit(n, 0.95) / special.stdtrit(n, 0.975)
    worst = max(abs(gap.mean - half), abs(gap.mean + half))
    passed = bool(worst < MARGIN and inside)
    pairs = [a - b for a, b in zip(losses["wsd"], losses["cosine"], strict=True)]
    return base.Outcome(
        passed=passed,
        measured=f"WSD less cosine {gap.mean:+.4f} nats/byte, at most {worst:.4f} apart"
        + ("" if inside else "; a best rate lies at the edge of its grid"),
        interval=(gap.mean, gap.low, gap.high),
        of="WSD less cosine in nats/byte",
        numbers=arms.count_model(bench, task, steps) | {"losses": losses, "sweeps": swept},
        analysis=""
        if passed
        else f"The pairs' standard deviation is {np.std(pairs, ddof=1):.4f} nats, so that eight of "
        "them bound even equal arms only within "
        f"{np.std(pairs, ddof=1) * special.stdtrit(n, 0.95) / (n + 1) ** 0.5:.4f}; the two best "
        "rates differ, and seeds part more at the higher one.",
    )
