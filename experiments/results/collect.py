"""The quickstart's comparison with its dense baseline, from the sweep's runs to one small JSON.

Command:  python3 experiments/results/collect.py [runs/quickstart_vs_dense]
Reads every finished child's run.json and summary.json, and writes quickstart_vs_dense.json beside
this file: per seed and arm the held-out score, then the paired differences with a 95 % interval.
"""

import dataclasses
import json
import sys
from pathlib import Path

from sparse_pretrain.report import stats

HERE = Path(__file__).parent
ARMS = ("quickstart", "dense_baseline")


def rows(root: Path) -> list[dict]:
    """One row per finished child, by arm and seed."""
    found: list[dict] = []
    for path in sorted(root.glob("*/summary.json")):
        run = json.loads((path.parent / "run.json").read_text())
        summary = json.loads(path.read_text())
        keep = ("bits_per_byte", "nats_per_token", "tokens", "tokens_per_second", "flops")
        found.append(
            {
                "arm": run["config"]["name"],
                "seed": run["config"]["seed"],
                "lr": run["config"]["optim"]["lr"],
                **{k: summary[k] for k in keep},
                "manifest": summary["manifest_hash"],
                "commit": run["commit"],
                "device": run["device"],
                "versions": run["versions"],
            }
        )
    return sorted(found, key=lambda r: (r["seed"], ARMS.index(r["arm"]), r["lr"]))


def main(folder: str = "runs/quickstart_vs_dense") -> None:
    """Writes the JSON and prints the table."""
    found = rows(Path(folder))
    by = {arm: {r["seed"]: r for r in found if r["arm"] == arm} for arm in ARMS}
    # a tuning sweep has one seed and many rates: nothing to pair
    paired_arms = len(found) == len(by[ARMS[0]]) + len(by[ARMS[1]])
    seeds = sorted(by[ARMS[0]].keys() & by[ARMS[1]].keys()) if paired_arms else []
    scores = [[by[arm][s]["bits_per_byte"] for s in seeds] for arm in ARMS]
    result = {"rows": found, "seeds": seeds}
    if len(seeds) > 1:
        paired = stats.paired(*scores)
        result["difference"] = dataclasses.asdict(paired) | {"confidence": 0.95}
    name = Path(folder).name
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for r in found:
        print(
            f"{r['arm']:16s} seed {r['seed']:3d}  lr {r['lr']:.3g}  "
            f"{r['bits_per_byte']:.4f} bits/byte  {r['tokens_per_second']:.0f} tokens/s"
        )
    print(result.get("difference", "no pair of seeds is finished"))


if __name__ == "__main__":
    main(*sys.argv[1:])
