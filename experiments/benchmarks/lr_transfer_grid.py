"""Where the best learning rate lies at each width, with transfer on and off.

Question: experiments/lr_transfer.py
Command:  python3 experiments/benchmarks/lr_transfer_grid.py [--seeds=1] [--widths=64,128,256,512]
          --out=experiments/results/lr_transfer.json; a cell that the file holds is not run again.
Method:   each width's run is compiled once, with the rate as an argument. Rates are powers of the
          square root of 2; a cell's grid grows until its lowest loss has three neighbours on either
          side. The loss of a run is the training loss of its last quarter, no token read twice; the
          best rate is the vertex of the parabola through those seven. With transfer on, width 64 is
          the base: its runs are those with it off.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cpu_peers import commit

from sparse_pretrain import config, optim
from sparse_pretrain.optim import schedules
from sparse_pretrain.training import run, state, step

REACH = 3  # grid points wanted on either side of the lowest


def runner(experiment: config.Experiment):
    """A function from a rate to the losses of every step of the experiment with it."""
    prepared = run.prepare(experiment)
    e, definition, steps = prepared.experiment, prepared.definition, prepared.run.steps
    source = prepared.dataset.train()
    read = [next(source) for _ in range(steps)]
    batches = jax.tree.map(lambda *rows: jnp.stack(rows), *read)
    shape = schedules.make(
        e.schedule,
        peak=1.0,
        total_tokens=prepared.run.tokens,
        tokens_per_step=prepared.run.tokens_per_step,
    )
    factors = optim.factors(e.optim, e.model, definition, prepared.run.tokens)

    def losses(rate, seed):
        def schedule(n):
            return rate * shape(n)

        build = optim.TABLE[e.optim.KIND].build
        tx = build(e.optim, definition.dims, schedule, factors)
        one = step.make_train_step(definition, e.model, tx, schedule=schedule)
        fresh = state.create(definition, tx, 0, ema=False)
        params, _ = definition.init(jax.random.key(seed))
        fresh = fresh._replace(params=params, opt=tx.init(params))

        def body(carry, batch):
            carry, told = one(carry, batch)
            return carry, told["loss"]

        return jax.lax.scan(body, fresh, batches)[1]

    return jax.jit(losses)


def cell(losses, start: int, seed: int) -> dict[int, float]:
    """Exponent of sqrt(2) -> loss, on a grid that reaches past its lowest point on both sides."""
    found: dict[int, float] = {}

    def score(exponent):
        if exponent not in found:
            began = time.perf_counter()
            curve = np.asarray(losses(jnp.float32(2.0 ** (exponent / 2)), seed), np.float64)
            last = curve[-len(curve) // 4 :].mean()
            found[exponent] = float(last) if np.isfinite(last) else 1e9
            spent = time.perf_counter() - began
            print(f"  rate 2^{exponent / 2:g}: {found[exponent]:.4f}  {spent:.0f} s", flush=True)

    for exponent in range(start - 4, start + 5, 2):
        score(exponent)
    while True:
        lowest = min(found, key=found.__getitem__)
        missing = [x for x in range(lowest - REACH, lowest + REACH + 1) if x not in found]
        if not missing:
            return found
        score(missing[0])


def vertex(found: dict[int, float]) -> float:
    """The rate at the lowest point of the parabola about the lowest of the grid."""
    lowest = min(found, key=found.__getitem__)
    at = [x for x in range(lowest - REACH, lowest + REACH + 1) if x in found]
    a, b, _ = np.polyfit([x / 2 for x in at], [found[x] for x in at], 2)
    return float(2.0 ** (-b / (2 * a)))


def summary(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per arm: the best rate of each width, of the mean loss over seeds, and how far it moves."""
    out: dict[str, dict[str, float]] = {}
    for arm in ("on", "off"):
        best = {}
        for name, seeds in cells.items():
            width, kind = name.split("/")
            if kind != arm and not (width == "64" and arm == "on"):
                continue
            shared = set.intersection(*(set(grid) for grid in seeds.values()))
            mean = {int(x): np.mean([grid[x] for grid in seeds.values()]) for x in shared}
            best[width] = vertex(mean)
        rates = list(best.values())
        out[arm] = best | {"largest_over_smallest": max(rates) / min(rates)}
    return out


def by_seed(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How far each arm's best rate moves for every seed that all cells have, alone."""
    seeds = sorted(set.intersection(*(set(held) for held in cells.values())))
    alone = {s: summary({name: {s: held[s]} for name, held in cells.items()}) for s in seeds}
    return {s: {arm: v["largest_over_smallest"] for arm, v in x.items()} for s, x in alone.items()}


def flops(cells: dict[str, dict[str, dict[str, float]]], file: Path) -> float:
    """Training FLOPs of all runs in the cells."""
    total = 0.0
    for name, seeds in cells.items():
        width, arm = name.split("/")
        one = run.prepare(config.resolve(f"{file}:width={width},transfer={arm}")).derived["flops"]
        total += one * sum(len(grid) for grid in seeds.values())
    return total


def main() -> None:
    """Every cell that is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("lr_transfer.json"))
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}, "seconds": 0}
    at = commit()
    widths = [int(w) for w in args.widths.split(",")]
    starts = {"on": -13, "off": -13}
    file = Path(__file__).parents[1] / "lr_transfer.py"
    for width in widths:
        for arm in ("off", "on") if width > 64 else ("off",):
            held = record["cells"].setdefault(f"{width}/{arm}", {})
            todo = [str(s) for s in range(args.seeds) if str(s) not in held]
            if not todo:
                continue
            began = time.perf_counter()
            losses = runner(config.resolve(f"{file}:width={width},transfer={arm}"))
            for seed in todo:
                print(f"width {width}, transfer {arm}, seed {seed}", flush=True)
                grid = cell(losses, starts[arm], int(seed))
                held[seed] = {str(k): v for k, v in sorted(grid.items())}
                starts[arm] = int(min(held[seed], key=held[seed].__getitem__))
            record["seconds"] += time.perf_counter() - began
            record |= {"best": summary(record["cells"]), "commit": at}
            record["device"] = "cpu, one core"
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    record |= {"by_seed": by_seed(record["cells"]), "flops": flops(record["cells"], file)}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: record[k] for k in ("best", "by_seed", "flops")}, indent=1))


if __name__ == "__main__":
    main()
