"""C12: Multi-token prediction, hyper-connections and shared experts: gains at scale.

Source: 2412.19437, table 4; 2512.24880; 2601.07372; 2401.06066.
Published: gains at 1B parameters and more.
Kind: DIRECTION.
Tested: 2 layers of width 64, a ten-thousandth of the papers', 0.3M bytes of the Python library,
    Muon; a dense decoder with one token more predicted (weight 0.3) and with four residual streams,
    and 16 experts of width 32, top 2, of which one is shared, against top 2 of 16 without, by equal
    steps, not FLOPs; and the decoder with a memory of bytes' pairs and triples before its second
    layer (tables of 4,096 rows for each of two heads and orders, 64 numbers a token), whose
    parameters come on top. One learning rate, 0.04, the best of a dense decoder's four in C5 and of
    a mixture's four in C15: no arm has a search of its own. Three paired seeds.
Criterion: none: sign and size with intervals are reported.
Cost: 18 runs, minutes.
Result: REPORTED at 3e58d74: mtp +0.0079 [-0.0076, +0.0233] tie, mhc +0.0086 [-0.0661, +0.0832] tie,
    engram -0.3585 [-0.4100, -0.3070] lower, shared +0.0717 [+0.0019, +0.1415] higher nats/byte.
"""

from sparse_pretrain.claims import arms, base
from sparse_pretrain.report import stats

SEEDS = (0, 1, 2)
MUON = arms.MUON | dict(lr=0.04)
EXPERTS = dict(kind="moe", hidden=32, router=dict(kind="sigmoid_bias", rate=0.01))
ARMS = {
    "dense": {},
    "mtp": dict(mtp=dict(depth=1)),
    "mhc": dict(residual=dict(kind="mhc")),
    "engram": dict(memory=dict(layers=(1,), heads=2, width=64, rows=4096)),
    "experts": dict(ffn=EXPERTS | dict(experts=16, top_k=2, shared=0)),
    "shared": dict(ffn=EXPERTS | dict(experts=15, top_k=1, shared=1)),
}
AGAINST = {"mtp": "dense", "mhc": "dense", "engram": "dense", "shared": "experts"}


def measure(bench):
    """Every arm on every seed, and the pairs."""
    task, steps = arms.text(), bench.size(150, 10_000)
    width = bench.size(arms.WIDTH, 512)
    made = []
    for name, parts in ARMS.items():
        ffn = parts.get("ffn")
        grown = ffn and ffn | {"hidden": ffn["hidden"] * width // arms.WIDTH}
        section = arms.model(width=width, **parts | {"ffn": grown})
        made.append(arms.Arm(name, task, section, steps=steps, optimizer=MUON))
    losses = {arm.label: [arm.run(bench, seed)["loss"] for seed in SEEDS] for arm in made}
    flops = {arm.label: arm.flops for arm in made}
    gaps = {name: stats.paired(losses[name], losses[other]) for name, other in AGAINST.items()}
    widest = max(gaps.values(), key=lambda gap: abs(gap.mean))
    return base.Outcome(
        passed=None,
        measured=", ".join(f"{name} {gap}" for name, gap in gaps.items()) + " nats/byte",
        interval=(widest.mean, widest.low, widest.high),
        of="the largest of the differences in nats/byte",
        numbers=arms.count_model(bench, task, steps)
        | {
            "losses": losses,
            "FLOPs to its reference's": {n: flops[n] / flops[o] for n, o in AGAINST.items()},
        },
        analysis="Differences are of equal steps; above zero is worse. Minutes of training on "
        "little text say nothing of the papers' sizes.",
    )
