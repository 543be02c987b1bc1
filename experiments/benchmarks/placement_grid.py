"""Balance of experts over devices: every policy beside EPLB and beside no re-placement.

Question: how near to an even load do placements from the last window and schedules per batch come,
          and is a batch within 1.05 of the mean wherever a linear program says it can be?
Command:  python experiments/benchmarks/placement_grid.py --trace=runs/quickstart
Cost:     two CPU minutes on one core, most of it linear programs and the search.
Method:   64 and 256 experts on 8 and 32 devices, 12.5 % of copies rounded up to a whole slot per
          device (64 experts on 32 devices have 50 %), made-up Zipf loads with drift 0.5 over 64
          steps and noise 0.1 (`traces.zipf`), and recorded ones; placed by 12 steps (recorded: 20),
          scored on the next. `row_budget` and `least_loaded` fetch weights beyond the slots that
          the placement has; `eplb+row_budget` fetches into those slots and keeps no copies.
Expected: schedules per batch within 1.05 wherever the program allows it.
Measured: at 2365af9, numpy 2.5, scipy 1.18, recorded traces of two quickstart runs (seeds 1 and 4)
          max/mean load, mean of 12 Zipf cells and of 4 recorded; batches within 1.05 of 3,696;
          worst batch; experts fetched per batch and layer at 256 on 32
          policy             Zipf   recorded  within  worst  fetched
          none               4.914  1.095        449  20.70  0
          eplb               1.264  1.088        627   3.20  0
          lp                 4.120  1.000      1,969  19.81  0
          eplb+lp            1.142  1.026      2,331   3.20  0
          search+lp          1.071  1.005      2,884   1.80  0
          least_loaded       1.015  1.092      2,101   1.29  27
          eplb+least_loaded  1.099  1.084      1,229   1.30  9
          row_budget         1.000  1.000      3,696   1.00  31
          eplb+row_budget    1.000  1.000      3,696   1.01  31
          least_loaded@1.0   1.003  1.004      3,696   1.02  27
          Within what its own copies allow, `lp` missed 0 of 1,969, `eplb+lp` 2 of 2,333 and
          `search+lp` 0 of 2,884; the two are bounds just below 1.05 that whole tokens pass.
          Any placement of that many slots, chosen with hindsight, is bound by less than 1.05 in all
          3,696 batches, so without fetching `search+lp` misses 812 of them and `eplb+lp` 1,365.
          The bound leaves much out and may not be reached. `eplb+row_budget` was above its budget
          in two cells, by at most 2e-5 of the pairs.
          steps/s over EPLB, simulated with experts as half of a step and communication free:
          eplb+lp +5.0 %, search+lp +8.0 %, row_budget +11.0 %.
          `search+lp` moves 0.83 of the weights that EPLB moves. Planning, on a busy core: 2 to 10
          ms per batch and layer for a program, below 1 ms for what fetches, up to 6 s per layer and
          re-placement for the search.
Learned:  copies chosen for the past do not suffice under drift: a program over EPLB's copies stays
          at 1.14 to 1.38 on 32 devices. Fetching about one expert per device and batch does,
          at the price of that traffic, which nothing here measures. Fixed ring copies are the best
          where loads are nearly even (the quickstart's), and useless where they are not. The number
          of futures of the search was chosen on a part of these traces: 8 were too few. On others
          (every seed + 1000, 36 steps, 2 layers; not in the JSON) the Zipf means are eplb 1.255,
          eplb+lp 1.138, search+lp 1.087: a smaller gain, and none of the 12 cells worse.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
from cpu_peers import commit

from sparse_pretrain.report import workdir
from sparse_pretrain.sharding import policies, schedule, spill, traces

HERE = Path(__file__).resolve().parent
BAR = 1.05
WINDOW, STEPS, LAYERS = 12, 48, 4
PAIRS = 8192  # per device and batch
REDUNDANT = 0.125
SHARE = 0.5  # of a balanced step that is experts; step times are simulated with it
POLICIES = {
    **policies.TABLE,
    "least_loaded@1.0": dataclasses.replace(
        policies.TABLE["least_loaded"],
        what="experts in order; whatever is above the mean is spilled",
        options={"threshold": 1.0},
    ),
}


def cells(paths):
    """(name, loads [T, N, E], setting, window) of every cell of the grid."""
    for experts in (64, 256):
        for devices in (8, 32):
            for exponent in (0.5, 1.0, 1.5):
                load = traces.zipf(
                    steps=STEPS,
                    layers=LAYERS,
                    experts=experts,
                    pairs=PAIRS * devices,
                    exponent=exponent,
                    seed=experts + devices + int(10 * exponent),
                )
                yield f"zipf {exponent}", load, devices, WINDOW
    for path in paths:
        run = workdir.read(path)
        load = traces.from_rows(run.moe)
        name = f"{run.name} seed {run.config.get('seed', 0)}"
        for devices in (4, 8, 32):
            if load.shape[-1] % devices == 0:
                yield name, load, devices, min(20, len(load) // 2)


def score(name, load, devices, window):
    """One row per policy of one cell."""
    experts = load.shape[-1]
    slots = policies.slots_for(experts, devices, REDUNDANT)
    setting = policies.Setting(experts=experts, devices=devices, slots=slots)
    scored = load[window:].reshape(-1, experts)
    possible = np.array([schedule.slots_bound(x, slots, devices) for x in scored])
    cell = {"trace": name, "experts": experts, "devices": devices, "slots": slots}
    cell |= {"batches": len(scored), "possible": int((possible <= BAR).sum())}
    made = {}
    for policy, rule in POLICIES.items():
        bounds = rule.scheduler is schedule.linear_program
        made[policy] = policies.replay(load, rule, setting, window, bounds=bounds)
    rows = []
    for policy, r in made.items():
        ratio = r.ratio.ravel()
        row = {**cell, "policy": policy, "mean": ratio.mean(), "p95": np.quantile(ratio, 0.95)}
        row |= {"worst": ratio.max(), "within": int((ratio <= BAR).sum())}
        row["missed"] = int(((ratio > BAR) & (possible <= BAR)).sum())
        if r.bound is not None:
            own = r.bound.ravel()
            row["bound_mean"] = own.mean()
            row["bound_possible"] = int((own <= BAR).sum())
            row["bound_missed"] = int(((ratio > BAR) & (own <= BAR)).sum())
        row["simulated_gain_over_none"] = policies.step_gain(made["none"], r, SHARE)
        row["simulated_gain_over_eplb"] = policies.step_gain(made["eplb"], r, SHARE)
        row["overflow_share"] = r.overflow.sum() / max(1, r.load.sum())
        row["moved_experts"] = r.moved.sum(1).mean() / load.shape[1] if len(r.moved) else 0.0
        row["fetched_experts"] = r.fetched.mean()
        row["most_fetched_per_device"] = r.prefetch
        row["experts_per_device"] = r.slots
        row["planning_ms"] = 1000 * r.seconds / len(scored)
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows


def table(rows):
    """The rows as text: mean max/mean load by cell and policy."""
    keys = list(dict.fromkeys((r["trace"], r["experts"], r["devices"]) for r in rows))
    names = list(POLICIES)
    lines = [f"{'trace':22}{'E':>4}{'D':>4} " + "".join(f"{n:>18}" for n in names)]
    by = {((r["trace"], r["experts"], r["devices"]), r["policy"]): r for r in rows}
    for key in keys:
        means = "".join(f"{by[key, n]['mean']:18.3f}" for n in names)
        lines.append(f"{key[0]:22}{key[1]:4}{key[2]:4} {means}")
    return "\n".join(lines)


def verdict(rows):
    """Per policy, over all cells: batches that could be within the bar, and how many are not."""
    out = {}
    for name in POLICIES:
        mine = [r for r in rows if r["policy"] == name]
        out[name] = {
            "batches": sum(r["batches"] for r in mine),
            "within": sum(r["within"] for r in mine),
            "possible": sum(r["possible"] for r in mine),
            "missed": sum(r["missed"] for r in mine),
            "mean": float(np.mean([r["mean"] for r in mine])),
            "worst": max(r["worst"] for r in mine),
            "mean_gain_over_eplb_simulated": float(
                np.mean([r["simulated_gain_over_eplb"] for r in mine])
            ),
        }
        if "bound_possible" in mine[0]:
            for key in ("bound_possible", "bound_missed"):
                out[name][key] = sum(r[key] for r in mine)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", action="append", default=[], help="a run; may be repeated")
    parser.add_argument("--out", default=str(HERE.parent / "results/placement_grid.json"))
    options = parser.parse_args()
    began, busy, rows = time.perf_counter(), time.process_time(), []
    for cell in cells(options.trace):
        rows += score(*cell)
        print(f"{cell[0]}, {cell[1].shape[-1]} experts, {cell[2]} devices", file=sys.stderr)
    print(table(rows))
    found = verdict(rows)
    for name, v in found.items():
        own = ""
        if "bound_missed" in v:
            own = f", {v['bound_missed']} of {v['bound_possible']} that its copies allow"
        print(
            f"{name:18} within {BAR}: {v['within']} of {v['batches']}; missed {v['missed']} of "
            f"{v['possible']} possible{own}; worst {v['worst']:.3f}; steps/s over EPLB "
            f"{100 * v['mean_gain_over_eplb_simulated']:+.1f} % (simulated)"
        )
    record = {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "settings": {
            "bar": BAR,
            "window": WINDOW,
            "steps": STEPS,
            "layers": LAYERS,
            "pairs_per_device": PAIRS,
            "redundant": REDUNDANT,
            "expert_share": SHARE,
            "spill_above": spill.SPILL_ABOVE,
            "step_time": "simulated: experts take the time of the busiest device",
        },
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - busy,
        "verdict": found,
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {options.out}, {record['cpu_seconds']:.0f} CPU seconds")


if __name__ == "__main__":
    main()
