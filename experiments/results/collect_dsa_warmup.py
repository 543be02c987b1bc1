"""The DSA warm-up sweep in one small JSON, what was found of its indexers, and the verdicts.

Command:  for run in runs/dsa_warmup/*/; do
            python3 experiments/benchmarks/indexer_mass.py --workdir=$run --batches=16 \
              --json=runs/dsa_warmup/mass.jsonl; done
          python3 experiments/results/collect_dsa_warmup.py [runs/dsa_warmup]
Reads every finished child's run.json and summary.json and the lines of mass.jsonl, the last one of
each run, and writes NAME.json beside this file.
"""

import json
import math
import sys
from pathlib import Path

from scipy import stats

HERE = Path(__file__).parent
SUMMARY = ("bits_per_byte", "nats_per_token", "tokens", "steps", "tokens_per_second")
MASS_BAR, COST_BAR = 0.90, 0.005


def rows(root: Path) -> list[dict]:
    """One row per finished child, by arm and seed, with its indexer's masses where measured."""
    lines, masses = root / "mass.jsonl", {}
    if lines.exists():
        for line in lines.read_text().splitlines():
            found = json.loads(line)
            masses[found.pop("workdir")] = found
    found = []
    for path in root.glob("*/summary.json"):
        run = json.loads((path.parent / "run.json").read_text())
        summary = json.loads(path.read_text())
        row = {"arm": run["config"]["name"].rsplit("_", 1)[1], "seed": run["config"]["seed"]}
        row |= {key: summary[key] for key in SUMMARY} | {"manifest": summary["manifest_hash"]}
        row |= {key: run[key] for key in ("commit", "device", "versions")}
        if path.parent.name in masses:
            row["indexer_mass"] = masses[path.parent.name]
        found.append(row)
    return sorted(found, key=lambda r: (r["arm"], r["seed"]))


def rise(found: list[dict]) -> tuple[float, float, int]:
    """(mean relative rise of sparse over dense, its one-sided 95 % bound, pairs of seeds)."""
    bits = {(r["arm"], r["seed"]): r["bits_per_byte"] for r in found}
    seeds = sorted(s for arm, s in bits if arm == "sparse" and ("dense", s) in bits)
    ratios = [bits["sparse", s] / bits["dense", s] - 1 for s in seeds]
    if len(ratios) < 2:
        raise ValueError(f"seeds: a bound takes two pairs of sparse and dense, got {len(ratios)}")
    mean = math.fsum(ratios) / len(ratios)
    bound = mean + stats.t.ppf(0.95, len(ratios) - 1) * stats.sem(ratios)
    return mean, float(bound), len(ratios)


def main(folder: str = "runs/dsa_warmup") -> None:
    """Writes the JSON and prints the verdicts."""
    root = Path(folder)
    found = rows(root)
    try:
        mean, bound, pairs = rise(found)
    except ValueError as e:
        sys.exit(f"error: {root}: {e}")
    (HERE / f"{root.name}.json").write_text(json.dumps({"rows": found}, indent=1) + "\n")
    verdict = "met" if bound <= COST_BAR else "MISSED"
    print(f"sparse against dense, {pairs} seeds: {mean:+.3%}, at most {bound:+.3%} (one-sided "
          f"95 %), bar {COST_BAR:.1%}: {verdict}")
    masses = [r["indexer_mass"]["mass"] for r in found if r["arm"] == "sparse" and
              "indexer_mass" in r]
    if masses:
        for name in masses[0]:
            values = [m[name] for m in masses]
            print(f"mass, {name:8s} {math.fsum(values) / len(values):.3f} "
                  f"({min(values):.3f} to {max(values):.3f}), {len(values)} seeds")
        least = min(m["indexer"] for m in masses)
        print(f"indexer at least {MASS_BAR}: {'met' if least >= MASS_BAR else 'MISSED'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
