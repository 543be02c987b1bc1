"""C9: DoReMi's game equalises what is left to learn, and helps the worst domain.

Source: 2305.10429, algorithm 1 and section 3.
Published: 2.6 times fewer steps and +6.5 points, out of reach here.
Kind: DIRECTION.
Tested: the published rate of 1. Known law: four power laws of the tokens a domain gets, played from
    even weights, with smoothing 1e-4: that of the paper, 1e-3, holds weights off equality by more
    than the bar, as its fixed point says, and is shown beside. Real domains, with the paper's
    smoothing: arxiv, c4, github and wikipedia by bytes; a reference run on even weights; then for
    each seed a run on even weights, a proxy whose rows the game draws, and a run on the mean of the
    proxy's weights, which is compared; 2 layers of width 64, 0.8M bytes, no text read twice, one
    learning rate for all.
Criterion: excess losses equal to 1e-3 on a known law; on four real domains the worst domain not
    above uniform, 3 seeds.
Cost: 10 runs, some ten minutes.
Result: FAIL at 003acf7: known law: excess losses 0.13 apart, then 2.3e-04 (with the paper's
    smoothing 2.3e-03); worst of four domains +0.0851 [-0.1124, +0.2825] tie nats/byte, 0/3 not
    above (of the game's own runs +0.2244 [-0.0968, +0.5456] tie).
"""

import numpy as np

from sparse_pretrain import config
from sparse_pretrain.claims import arms, base
from sparse_pretrain.games import mixtures
from sparse_pretrain.report import stats
from sparse_pretrain.training import loop

NAMES = ("arxiv", "c4", "github", "wikipedia")
SEEDS, REFERENCE = (0, 1, 2), 100
STEPS = 400
# The known law: E + B (weight x N)^-a, and how far a reference is ahead of even weights.
FLOOR, SIZE = np.array([1.0, 1.3, 0.7, 2.0]), np.array([9.0, 14.0, 7.0, 20.0])
POWER, N = np.array([0.30, 0.34, 0.28, 0.36]), 1e6
AHEAD = np.array([0.15, 0.02, 0.10, 0.05])


def known_law(smoothing, rounds=3000):
    """Excess losses of the law when the game has been played."""

    def loss(weight):
        return FLOOR + SIZE * (weight * N) ** -POWER

    even = np.full(4, 0.25)
    reference = loss(even) - AHEAD
    game = mixtures.DoremiConfig(reference="the law's", smoothing=smoothing)
    state, ones = mixtures.start(even, reference), np.ones(4)
    for _ in range(rounds):
        state = mixtures.update(game, state, loss(state.weight), ones, state.weight)
    return loss(state.weight) - reference


def train(bench, folder, label, seed, mixture):
    """Held-out nats per byte of each domain after a run, and its mean weights."""
    section = dict(
        source=f"text_folder:{folder}", tokenizer="bytes", seq=arms.SEQ, batch=arms.BATCH,
        mixture=mixture,
    )  # fmt: skip
    values = dict(
        name="mixture", seed=seed, steps=STEPS, data=section, model=arms.model(),
        optim=arms.MUON, schedule=arms.WSD, checkpoint=dict(best=False),
        eval=dict(tokens=262_144), sample=dict(tokens=0),
    )  # fmt: skip
    wanted = config.from_config_dict(values)
    content = {k: v for k, v in wanted.to_dict().items() if k not in ("data", "name")}
    told = {k: v for k, v in mixture.items() if k != "reference"}

    def make():
        done = loop.train(wanted, bench.folder / label, [], quiet=True)
        return {
            "nats": {k: v["nats_per_token"] for k, v in done["per_domain"].items()},
            "weights": done["mixture"],
            "flops": done["flops"],
            "seconds": done["wall_seconds"],
        }

    found = bench.kept(label, content | {"mixture": told, "batch": arms.BATCH}, make)
    shown = ", ".join(f"{k} {v:.4f} at {found['weights'][k]:.3f}" for k, v in found["nats"].items())
    bench.say(f"  {label}: {shown}")
    return found


def measure(bench):
    """The law, then every seed's three runs."""
    excess = known_law(1e-4)
    spread, wide = float(np.ptp(excess)), float(np.ptp(known_law(1e-3)))
    folder = {bench.data(f"domains/{name}/{name}.txt").parents[1] for name in NAMES}.pop()
    even = dict(kind="fixed")
    train(bench, folder, "reference", REFERENCE, even)
    game = dict(kind="doremi", reference=str(bench.folder / "reference"))
    found = {}
    for seed in SEEDS:
        proxy = train(bench, folder, f"game-s{seed}", seed, game)
        mean = ",".join(f"{k}={v:.6f}" for k, v in proxy["weights"].items())
        found[seed] = {
            "even": train(bench, folder, f"even-s{seed}", seed, even),
            "game": proxy,
            "its mean": train(bench, folder, f"mean-s{seed}", seed, even | dict(weights=mean)),
        }
    worst = {
        arm: [max(runs[arm]["nats"].values()) for runs in found.values()]
        for arm in ("even", "game", "its mean")
    }
    gap = stats.paired(worst["its mean"], worst["even"])
    wins = sum(a <= b for a, b in zip(worst["its mean"], worst["even"], strict=True))
    online = stats.paired(worst["game"], worst["even"])
    return base.Outcome(
        passed=spread <= 1e-3 and wins == len(SEEDS),
        measured=f"known law: excess losses {np.ptp(AHEAD):.2f} apart, then {spread:.1e} (with the "
        f"paper's smoothing {wide:.1e}); worst of four domains {gap} nats/byte, {wins}/3 not above "
        f"(of the game's own runs {online})",
        interval=(gap.mean, gap.low, gap.high),
        of="the worst domain's nats/byte, less even weights'",
        numbers={
            "excess losses on the law": excess.tolist(),
            "worst domain, nats per byte by seed": worst,
            "by seed": {
                str(seed): {
                    arm: {"nats per byte": run["nats"], "mean weights": run["weights"]}
                    for arm, run in runs.items()
                }
                for seed, runs in found.items()
            },
        },
        analysis=ANALYSIS,
    )


ANALYSIS = (
    "At the published rate of 1 the game does not settle in 400 steps: one domain at a time has "
    "most of the rows, while the others are not read and are then found worse than they were last. "
    "The reference's final losses are below those of most of the run, so that excesses are large, "
    "and a step multiplies the ratio of two weights by e to their difference. The mean of such "
    "weights is nearly even, or gives wikipedia, the worst domain, less. The paper's proxy weighs "
    "losses, and so reads every domain all along. Smaller rates and more smoothing were not tried: "
    "the rule was fixed beforehand. The minutes hold some twenty in which the process was stopped."
)
