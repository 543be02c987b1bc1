"""The router bake-off's runs in one small JSON, and its table.

Command:  python3 experiments/results/collect_routers.py [runs/router_bakeoff] [--unread=TOKENS]
Reads every finished child's run.json and summary.json, and writes NAME.json beside this file. With
--unread, every arm of seed 0 and quantile of every seed also route that much text which they never
read, which gives MaxVio over it.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import scipy.stats

from sparse_pretrain.report import stats

HERE = Path(__file__).parent
BASE = "aux_loss"
SUMMARY = ("bits_per_byte", "tokens_per_second", "max_vio_batch", "max_vio_global", "dead_experts")


def setting(config: dict) -> dict:
    """What a tuning sweep varies: the learning rate and the router's section."""
    return {"lr": config["optim"]["lr"], **config["model"]["blocks"]["moe"]["ffn"]["router"]}


def rows(root: Path) -> list[dict]:
    """One row per finished child."""
    found = []
    for path in sorted(root.glob("*/summary.json")):
        run = json.loads((path.parent / "run.json").read_text())
        summary = json.loads(path.read_text())
        row = {
            "arm": run["config"]["name"].removeprefix("router_bakeoff_"),
            "seed": run["config"]["seed"],
            "tokens": summary["tokens"],
            **{k: summary.get(k) for k in (*SUMMARY, "duality_gap")},
            "setting": setting(run["config"]),
            "manifest": summary["manifest_hash"],
            "commit": run["commit"],
            "workdir": path.parent.name,
        }
        found.append(row)
    return sorted(found, key=lambda r: (r["arm"], r["seed"], str(r["setting"])))


def bound(ours: list[float], theirs: list[float]) -> float:
    """The upper end of the one-sided 95 % interval of the mean paired difference."""
    d = np.subtract(ours, theirs)
    t = scipy.stats.t.ppf(0.95, len(d) - 1)
    return float(d.mean() + t * d.std(ddof=1) / np.sqrt(len(d)))


def compared(found: list[dict]) -> list[dict]:
    """Every arm against the balance loss over the seeds that both have."""
    by: dict[str, dict[int, dict]] = {}
    for r in found:
        by.setdefault(r["arm"], {})[r["seed"]] = r
    table = []
    for arm, runs in by.items():
        line = {"arm": arm, "seeds": len(runs)}
        line |= {k: float(np.mean([r[k] for r in runs.values()])) for k in SUMMARY}
        seeds = sorted(runs.keys() & by.get(BASE, {}).keys())
        if arm != BASE and len(seeds) > 1:
            ours, theirs = ([by[a][s]["bits_per_byte"] for s in seeds] for a in (arm, BASE))
            line["difference"] = dataclasses.asdict(stats.paired(ours, theirs))
            line["verdict"] = stats.paired(ours, theirs).verdict
            line["worse_by_at_most"] = bound(ours, theirs) / float(np.mean(theirs))
        unread = [r["unread"]["max_vio_global"] for r in runs.values() if "unread" in r]
        if unread:
            line["max_vio_unread"] = float(np.mean(unread))
        table.append(line)
    return sorted(table, key=lambda r: r["bits_per_byte"])


def route_unread(root: Path, found: list[dict], tokens: int) -> None:
    """Adds to rows what routing text that the run has not read says."""
    from sparse_pretrain.training import run, trained

    run.prepare_process()
    for r in found:
        if r["seed"] == 0 or r["arm"] == "quantile":
            opened = trained.open_run(root / r["workdir"])
            scores = trained.scores(opened, unread_tokens=tokens)
            keep = ("bits_per_byte", "max_vio_global", "dead_experts", "duality_gap")
            r["unread"] = {k: scores[k] for k in keep if k in scores} | {"tokens": scores["tokens"]}
            print(r["arm"], r["seed"], r["unread"], flush=True)


def main() -> None:
    """Writes the JSON and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/router_bakeoff"))
    parser.add_argument("--unread", type=int, default=0, metavar="TOKENS")
    options = parser.parse_args()
    found = rows(options.folder)
    if options.unread:
        route_unread(options.folder, found, options.unread)
    tuning = len({(r["arm"], r["seed"]) for r in found}) < len(found)
    table = [] if tuning else compared(found)
    result = {"table": table, "rows": found}
    (HERE / f"{options.folder.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for r in found if tuning else ():
        vio = [f"{r[k]:.3f}" for k in ("max_vio_batch", "max_vio_global")]
        print(f"{r['arm']:14s} {r['bits_per_byte']:.4f}  MaxVio {' '.join(vio)}  {r['setting']}")
    if table:
        head = f"against {BASE}, 95 %             verdict  batch  held out  dead"
        print(f"{'arm':14s} bits/byte  {head}")
    for r in table:
        d = r.get("difference")
        span = f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else ""
        print(
            f"{r['arm']:14s} {r['bits_per_byte']:.4f}     {span:28s} {r.get('verdict', ''):7s}"
            f" {r['max_vio_batch']:6.3f}  {r['max_vio_global']:8.3f}  {r['dead_experts']:4.1f}"
            f"  {r['tokens_per_second']:6.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
