"""The runs of the recall sweep in one small JSON, and their table.

Command:  python3 experiments/results/collect_recall.py [runs/recall]
Reads every finished child's run.json, summary.json and eval.jsonl, and writes NAME.json beside this
file: per task and attention the accuracy over held-out answers, its curve, and the seconds. Draws
the curves as NAME.svg where it is run.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
SUMMARY = (
    "accuracy", "nats_per_token", "steps", "tokens", "tokens_per_second", "heldout_tokens", "flops"
)
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
                "long_from": next(r["step"] for r in curve if r["phase"] != "short"),
                "curve": [[r["step"], r["accuracy"]] for r in curve],
                "manifest": summary["manifest_hash"],
                "commit": run["commit"],
                "device": run["device"],
                "versions": run["versions"],
            }
        )
    return sorted(found, key=lambda r: (r["task"], -r["accuracy"], r["seed"]))


def plot(found: list[dict], file: Path) -> None:
    """Accuracy against tokens, a panel per task; a dashed line where examples become long."""
    tasks = sorted({r["task"] for r in found})
    kinds = list(dict.fromkeys(r["attention"] for r in found))
    figure = Figure(figsize=(4.2 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for r in (r for r in found if r["task"] == task):
            colour = f"C{kinds.index(r['attention'])}"
            label = r["attention"] if colour not in [x.get_color() for x in axes.lines] else None
            axes.plot(*zip(*r["curve"], strict=True), color=colour, label=label)
        axes.axvline(found[0]["long_from"], color="grey", linestyle="--", linewidth=0.8)
        axes.set(title=task, xlabel="step", ylim=(-0.03, 1.03))
        axes.grid(visible=True, linewidth=0.5, alpha=0.5)
    panels[0].set_ylabel("right answers on long held-out examples")
    panels[-1].legend(frameon=False, fontsize=9)
    figure.savefig(file)


def main(folder: str = "runs/recall") -> None:
    """Writes the JSON and prints the table."""
    found = rows(Path(folder))
    name = Path(folder).name
    (HERE / f"{name}.json").write_text(json.dumps({"rows": found}, indent=1) + "\n")
    plot(found, Path(f"{name}.svg"))
    for r in found:
        print(
            f"{r['task']:7s} {r['attention']:8s} seed {r['seed']}  accuracy {r['accuracy']:.3f}  "
            f"{r['steps']:4d} steps  {r['train_seconds']:.0f} s of steps, "
            f"{r['compile_seconds']:.0f} s compiling"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
