"""C4: Many small experts beat few large ones at the same active width.

Source: 2401.06066, section 4 (DeepSeekMoE against GShard at equal parameters and FLOPs).
Published: Pile loss 1.867 to 1.808 (0.2B active, with shared experts).
Kind: DIRECTION.
Tested: 8 experts of width 128, one chosen, against 64 of width 16, eight chosen: 2 layers of width
    64, 0.4M parameters, 0.3M bytes of the Python library, a 4,000th of the paper's active
    parameters; three paired seeds, loss-free balance, one rate for both, no shared expert.
Criterion: 64 top-8 below 8 top-1 on held-out text, 3/3.
Cost: 6 runs, a few minutes.
Result: PASS at f6b2f03: 2.138 to 2.050 nats/byte, 3/3.
"""

from sparse_pretrain.claims import arms, base
from sparse_pretrain.report import stats

SEEDS = (0, 1, 2)
ROUTER = dict(kind="sigmoid_bias", rate=0.003)
ARMS = {
    "8 top-1": dict(experts=8, top_k=1, hidden=128, shared=0),
    "64 top-8": dict(experts=64, top_k=8, hidden=16, shared=0),
}


def measure(bench):
    """Held-out losses of every arm and seed."""
    task, steps = arms.text(), bench.size(150, 10_000)
    width = bench.size(arms.WIDTH, 512)
    found = {}
    for name, section in ARMS.items():
        grown = section | {"hidden": section["hidden"] * width // arms.WIDTH}
        ffn = dict(kind="moe", router=ROUTER, **grown)
        arm = arms.Arm(name.replace(" ", "-"), task, arms.model(ffn=ffn, width=width), steps=steps)
        found[name] = [arm.run(bench, seed)["loss"] for seed in SEEDS]
    coarse, fine = found.values()
    gain = stats.paired(coarse, fine)
    wins = sum(f < c for f, c in zip(fine, coarse, strict=True))
    return base.Outcome(
        passed=wins == len(SEEDS),
        measured=f"{sum(coarse) / 3:.3f} to {sum(fine) / 3:.3f} nats/byte, {wins}/3",
        interval=(gain.mean, gain.low, gain.high),
        of="the gain in nats/byte",
        numbers=arms.count_model(bench, task, steps) | {"nats per byte by seed": found},
    )
