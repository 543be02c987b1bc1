"""C10: The best learning rate stays where it is as the model grows, under muP.

Source: 2203.03466, figure 1.
Published: stable over width with muP, shifting without.
Kind: DIRECTION.
Tested: our own AdamW runs on a grid of square roots of 2 (experiments/lr_transfer.py, `python3
    experiments/benchmarks/lr_transfer_grid.py`) and the coordinate check beside it, which are
    committed and which this reads.
Criterion: shift at most one factor of 2 with, two or more without, widths 64 to 512; coordinate
    slopes below 0.1.
Cost: the runs of half an hour of one core.
Result: PASS at 2bdbe2d: the best rate moves by a factor of 1.43 with and 5.58 without; largest
    slope 0.086 with, 1.35 without.
"""

import json
import math

from sparse_pretrain.claims import base, results
from sparse_pretrain.report import stats

WIDTHS = ("64", "128", "256", "512")


def measure(bench):
    """How far the best rate moves, with and without, and the largest slope of a coordinate."""
    held = {}
    for name in ("lr_transfer", "coordinate_check"):
        file = results.folder().parent / f"{name}.json"
        if not file.exists():
            raise base.NotRun(f"experiments/results/{name}.json does not ship here, or is not made")
        held[name] = json.loads(file.read_text(encoding="utf-8"))
    grid, check = held["lr_transfer"], held["coordinate_check"]
    bench.seconds += grid["seconds"]
    bench.flops += grid["flops"]
    bench.commits |= {grid["commit"], check["commit"]}
    lacks = [f"{w} {arm}" for arm in ("on", "off") for w in WIDTHS if w not in grid["best"][arm]]
    if lacks:
        raise base.NotRun(f"the grid of learning rates lacks width {lacks[0]}")
    moved = {arm: math.log2(grid["best"][arm]["largest_over_smallest"]) for arm in ("on", "off")}
    slopes = {arm: check[arm]["largest_slope"] for arm in ("on", "off")}
    met = {
        "moves by at most a factor of 2 with": moved["on"] <= 1,
        "by two factors or more without": moved["off"] >= 2,
        "slopes below 0.1": slopes["on"] < 0.1,
    }
    seeds = grid["by_seed"].values()
    apart = [math.log2(moves["off"] / moves["on"]) for moves in seeds]
    short = [name for name, ok in met.items() if not ok]
    return base.Outcome(
        passed=not short,
        measured=f"the best rate moves by a factor of {2 ** moved['on']:.2f} with and "
        f"{2 ** moved['off']:.2f} without; largest slope {slopes['on']:.3f} with, "
        f"{slopes['off']:.2f} without",
        interval=stats.interval(apart),
        of=f"factors of 2 that the best rate moves further without, by seed, {len(apart)} pairs",
        numbers={"best rate": grid["best"], "moved, by seed": grid["by_seed"], "slopes": slopes},
        analysis="" if not short else f"Missed: {', '.join(short)}.",
    )
