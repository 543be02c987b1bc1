"""C5: Muon needs about half of AdamW's FLOPs.

Source: 2502.16982, figure 3.
Published: about 52 % of AdamW's FLOPs at compute-optimal training.
Kind: DIRECTION.
Tested: a dense decoder of 2 layers and width 64, 0.3M bytes of the Python library, no byte twice;
    four learning rates for each optimizer on a seed of their own (more while a best one is at the
    edge), best against best on three paired seeds; the step at which Muon's evaluations reach
    AdamW's final loss, 15 evaluations a run.
Criterion: gap above 0.05 nats/byte and steps ratio below 0.75, 3/3, both rates interior.
Cost: 14 runs, minutes.
Result: PASS at cdef768: gap 0.335 nats/byte, AdamW's loss at 46 % of the steps, 3/3.
"""

from sparse_pretrain.claims import arms, base
from sparse_pretrain.report import stats

SEEDS = (0, 1, 2)
OPTIMIZERS = {"adamw": dict(kind="adamw", lr=0.01), "muon": dict(kind="muon", lr=0.02)}
RATES = {"adamw": (0.003, 0.01, 0.03, 0.1), "muon": (0.01, 0.02, 0.04, 0.08)}
SHAPE = dict(kind="wsd", warmup=0.05, decay=0.4)


def measure(bench):
    """The sweeps, then the pairs."""
    task, steps = arms.text(), bench.size(150, 10_000)
    width = bench.size(arms.WIDTH, 512)
    made = [
        arms.Arm(
            name, task, arms.model(width=width), steps=steps, optimizer=optimizer, schedule=SHAPE,
            evaluations=15,
        )
        for name, optimizer in OPTIMIZERS.items()
    ]  # fmt: skip
    best, swept, inside = arms.tuned(bench, made, [RATES[arm.label] for arm in made])
    runs = {
        arm.label: [arm.run(bench, seed, rate=rate) for seed in SEEDS]
        for arm, rate in zip(made, best, strict=True)
    }
    gaps = [a["loss"] - b["loss"] for a, b in zip(runs["adamw"], runs["muon"], strict=True)]
    ratios = [
        arms.reached(b["curve"], a["loss"]) / steps
        for a, b in zip(runs["adamw"], runs["muon"], strict=True)
    ]
    wins = sum(g > 0.05 and r < 0.75 for g, r in zip(gaps, ratios, strict=True))
    mean, low, high = stats.interval(gaps)
    share = sum(ratios) / len(ratios)
    return base.Outcome(
        passed=wins == len(SEEDS) and inside,
        measured=f"gap {mean:.3f} nats/byte, AdamW's loss at {100 * share:.0f} % of the steps, "
        f"{wins}/3" + ("" if inside else "; a best rate lies at the edge of its grid"),
        interval=(mean, low, high),
        of="the gap in nats/byte",
        numbers=arms.count_model(bench, task, steps)
        | {
            "losses": {name: [r["loss"] for r in part] for name, part in runs.items()},
            "share of steps": ratios,
            "sweeps": swept,
            "curves, mean over seeds": {
                name: [
                    [n, sum(r["curve"][i][1] for r in part) / len(part)]
                    for i, (n, _) in enumerate(part[0]["curve"])
                ]
                for name, part in runs.items()
            },
        },
    )
