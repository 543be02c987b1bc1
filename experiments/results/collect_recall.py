"""The runs of the recall sweep in one small JSON, and their table.

Command:  python3 experiments/results/collect_recall.py [runs/recall]
Reads every finished child's run.json, summary.json and eval.jsonl, and writes NAME.json beside this
file: per task and attention the accuracy over held-out answers, its curve, and the seconds.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUMMARY = ("accuracy", "nats_per_token", "steps", "tokens", "tokens_per_second", "heldout_tokens")
SECONDS = ("train_seconds", "compile_seconds", "wall_seconds")


def rows(root: Path) -> list[dict]:
    """One row per finished child, by task and accuracy."""
    found: list[dict] = []
    for path in sorted(root.glob("*/summary.json")):
        run = json.loads((path.parent / "run.json").read_text())
        summary = json.loads(path.read_text())
        lines = (path.parent / "eval.jsonl").read_text().splitlines()
        curve = [json.loads(line) for line in lines]
        attention = run["config"]["model"]["blocks"]["block"]["attention"]
        found.append(
            {
                "task": run["config"]["data"]["source"].split(":")[1],
                "attention": attention["kind"],
                "setting": attention,
                "seed": run["config"]["seed"],
                "source": run["config"]["data"]["source"],
                **{k: summary[k] for k in (*SUMMARY, *SECONDS)},
                "curve": [[r["step"], r["accuracy"]] for r in curve],
                "manifest": summary["manifest_hash"],
                "commit": run["commit"],
                "device": run["device"],
                "versions": run["versions"],
            }
        )
    return sorted(found, key=lambda r: (r["task"], -r["accuracy"], r["seed"]))


def main(folder: str = "runs/recall") -> None:
    """Writes the JSON and prints the table."""
    found = rows(Path(folder))
    name = Path(folder).name
    (HERE / f"{name}.json").write_text(json.dumps({"rows": found}, indent=1) + "\n")
    for r in found:
        print(
            f"{r['task']:7s} {r['attention']:8s} seed {r['seed']}  accuracy {r['accuracy']:.3f}  "
            f"{r['steps']:4d} steps  {r['train_seconds']:.0f} s of steps, "
            f"{r['compile_seconds']:.0f} s compiling"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
