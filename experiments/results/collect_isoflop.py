"""The iso-FLOP experiment, from its workdir to one small JSON and a plot beside this file.

Command:  python3 experiments/results/collect_isoflop.py [runs/isoflop]
Reads isoflop.json, the fits, and beyond/forecasts.json and beyond/score.json as far as they are
there: what is written before the runs beyond the grid holds their forecasts, and no scores.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from sparse_pretrain import config
from sparse_pretrain.scaling import forecast, isoflop
from sparse_pretrain.scaling.fit import laws, leverage
from sparse_pretrain.training import record

HERE = Path(__file__).parent
ROW = (
    "budget", "width", "params", "total_params", "tokens", "flops", "loss", "bits_per_byte",
    "seconds", "cpu_seconds", "memory", "tasks", "commit",
)  # fmt: skip


def ratios(arm: str) -> tuple[float, float]:
    """(ratio of activated experts, granularity) of a mixture, as Tian et al. (2507.17702) count."""
    model = config.resolve(arm).model
    ffn = model.layer_list[0].ffn
    active = (ffn.top_k + ffn.shared) / (ffn.experts + ffn.shared)
    return active, 2 * model.width / ffn.hidden


def read(root: Path) -> dict:
    """Everything of a workdir that the record keeps."""
    said = json.loads((root / "isoflop.json").read_text())
    name = lambda arm: arm.rpartition(":")[2]  # noqa: E731
    out: dict = {"corpus": said["rows"][0]["corpus"], "arms": {}, "leverage": {}, "rows": []}
    for arm, own in said["arms"].items():
        out["arms"][name(arm)] = own
        rows = [row for row in said["rows"] if row["arm"] == arm]
        out["rows"] += [{"arm": name(arm)} | {k: row.get(k) for k in ROW} for row in rows]
    for arm, found in said["leverage"].items():
        active, fine = ratios(arm)
        published = [leverage.ling(active, fine, row["flops"]) for row in found]
        out["leverage"][name(arm)] = [
            row | {"published_law": value} for row, value in zip(found, published, strict=True)
        ]
    for file in ("forecasts", "score"):
        path = root / "beyond" / f"{file}.json"
        if path.is_file():
            out[file] = json.loads(path.read_text())
    if "score" in out:
        out["accuracy_beyond"] = accuracies(root, list(said["arms"]), out["forecasts"])
    return out


def accuracies(root: Path, arms: list[str], forecasts: list[dict]) -> list[dict]:
    """Accuracy that the grid's curves say at the loss forecast for a run, and what it reached.

    The forecasts of loss were committed before the runs; these curves were fitted after them, to
    the grid's runs alone.
    """
    fits = {arm: forecast.read(root / "fits" / str(i)) for i, arm in enumerate(arms)}
    done = {(r["arm"], r["width"], r["tokens"]): r for r in isoflop.results(root / "beyond")}
    out = []
    for said in forecasts:
        row = done.get((said["arm"], said["width"], float(said["tokens"])))
        told = forecast.accuracies(
            fits[said["arm"]], said["loss"], said["interval"], said["validity"]
        )
        for one in told:
            if row is None or one["task"] not in row["tasks"]:
                continue
            right = row["tasks"][one["task"]]["accuracy"]
            inside = one["interval"] and one["interval"][0] <= right <= one["interval"][1]
            out.append({"arm": said["arm"], "width": said["width"]} | one
                       | {"measured": right, "inside": inside})  # fmt: skip
    return out


def plot(found: dict, root: Path, file: Path) -> None:
    """Loss over size with a curve per budget for each arm; forecasts and what came, beyond it."""
    arms = list(found["arms"])
    figure = Figure(figsize=(4.4 * len(arms), 3.8), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for place, (axes, arm) in enumerate(zip(panels, arms, strict=True)):
        rows = [row for row in found["rows"] if row["arm"] == arm]
        fit = forecast.read(root / "fits" / str(place))
        for colour, budget in enumerate(sorted({row["budget"] for row in rows})):
            part = sorted((r["params"], r["loss"]) for r in rows if r["budget"] == budget)
            x = [size for size, _ in part]
            axes.plot(*zip(*part, strict=True), "o", color=f"C{colour}", markersize=4)
            law = [forecast.loss(fit, params=n, tokens=budget / 6 / n)["loss"] for n in x]
            axes.plot(x, law, color=f"C{colour}", label=f"{budget:.2g} FLOPs")
            best = laws.optimum(fit.theta, budget)
            axes.plot([best[0]], [best[2]], "*", color=f"C{colour}", markersize=9)
        for row in found.get("forecasts", []):
            if row["arm"].endswith(f":{arm}"):
                low, high = row["interval"]
                at = [[row["loss"] - low], [high - row["loss"]]]
                axes.errorbar([row["params"]], [row["loss"]], at, color="grey", capsize=2)
        for row in found.get("score", {}).get("runs", []):
            if row["arm"].endswith(f":{arm}"):
                axes.plot([row["params"]], [row["measured"]], "kx", markersize=5)
        axes.set(title=arm, xscale="log", xlabel="params (FLOPs per token over 6)")
        axes.grid(visible=True, linewidth=0.5, alpha=0.5)
    panels[0].set_ylabel("held-out loss, nats/token")
    panels[-1].legend(frameon=False, fontsize=8, title="law; grey: forecasts, x: measured")
    figure.savefig(file, metadata={"Date": None})


def main(folder: str = "runs/isoflop") -> None:
    """Writes both, and prints what the record quotes."""
    root = Path(folder)
    found = read(root)
    record.write_json(HERE / "isoflop.json", found)
    plot(found, root, HERE / "isoflop.svg")
    for arm in found["arms"]:
        rows = [row for row in found["rows"] if row["arm"] == arm]
        cpu, flops = (sum(row[k] for row in rows) for k in ("cpu_seconds", "flops"))
        print(f"{arm}: {len(rows)} runs, {cpu:.0f} CPU s of steps, {flops:.3g} FLOPs")
    for arm, found_here in found["leverage"].items():
        for row in found_here:
            low, high = row["interval"]
            print(
                f"{arm} at {row['flops']:.3g} FLOPs: leverage {row['leverage']:.3f} [{low:.3f}, "
                f"{high:.3f}], published law {row['published_law']:.3f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
