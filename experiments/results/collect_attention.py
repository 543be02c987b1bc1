"""The attention bake-off's runs in one small JSON, its table, its verdicts and a plot.

Command:  python3 experiments/results/collect_attention.py [runs/attention_bakeoff] [--plot=FILE]
Reads every finished child's run.json and summary.json, and writes NAME.json beside this file and
the loss by position as NAME.svg where it is run. Of a sweep of learning rates it prints each arm's
best one instead, as the dict that experiments/attention_bakeoff.py holds.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain.report import stats

HERE = Path(__file__).parent
FULL, SLIDING = "full", "sliding"
DENSE = {"dsa": "mla"}  # arms that have a dense counterpart other than full attention
FAR = 1024  # position from which context counts as long
ERRORS = 3.0  # standard errors that the gap must exceed
SHARE = 0.8  # of the gap that an arm should recover
SUMMARY = ("bits_per_byte", "nats_per_token", "tokens_per_second", "total_params", "tokens")
FLOPS = ("train_flops_per_token", "executed_flops_per_token")


def far(buckets: list[dict]) -> float:
    """Nats per token of the targets beyond position FAR."""
    found = [b for b in buckets if b["from"] >= FAR]
    tokens = sum(b["tokens"] for b in found)
    if not tokens:
        raise ValueError(f"by_position: no target beyond position {FAR}")
    return sum(b["nats_per_token"] * b["tokens"] for b in found) / tokens


def rows(root: Path) -> list[dict]:
    """One row per finished child."""
    found = []
    for path in sorted(root.glob("*/summary.json")):
        run = json.loads((path.parent / "run.json").read_text())
        summary = json.loads(path.read_text())
        found.append(
            {
                "arm": run["config"]["name"].removeprefix("attention_bakeoff_"),
                "seed": run["config"]["seed"],
                "lr": run["config"]["optim"]["lr"],
                **{key: summary[key] for key in SUMMARY},
                **{key: run["derived"][key] for key in FLOPS},
                "far": far(summary["by_position"]),
                "by_position": summary["by_position"],
                "attention": run["config"]["model"]["blocks"]["dense"]["attention"],
                "manifest": summary["manifest_hash"],
                "commit": run["commit"],
                "workdir": path.parent.name,
            }
        )
    return sorted(found, key=lambda r: (r["arm"], r["seed"], r["lr"]))


def rates(found: list[dict]) -> dict[str, float]:
    """Prints every arm's trials; gives each one's best rate."""
    best = {}
    for arm in dict.fromkeys(r["arm"] for r in found):
        own = [r for r in found if r["arm"] == arm]
        bits = [r["bits_per_byte"] for r in own]
        at = int(np.argmin(bits))
        best[arm] = own[at]["lr"]
        place = "inside" if 0 < at < len(own) - 1 else "AT THE EDGE of the rates"
        trials = "  ".join(f"{r['lr']:g}: {r['bits_per_byte']:.4f}" for r in own)
        print(f"{arm:9s} {trials}  best {best[arm]:g}, {place}")
    return best


def against(by: dict[str, dict[int, dict]], arm: str, base: str, key: str) -> dict | None:
    """The paired difference of `arm` to `base`; None below two seeds that both have."""
    seeds = sorted(by[arm].keys() & by.get(base, {}).keys())
    if arm == base or len(seeds) < 2:
        return None
    ours, theirs = ([by[a][s][key] for s in seeds] for a in (arm, base))
    return dataclasses.asdict(stats.paired(ours, theirs))


def gap(by: dict[str, dict[int, dict]]) -> dict | None:
    """What full attention gains over the window beyond FAR; None below two seeds of both."""
    found = against(by, SLIDING, FULL, "far")
    if found is None:
        return None
    seeds = sorted(by[FULL].keys() & by[SLIDING].keys())
    each = [by[SLIDING][s]["far"] - by[FULL][s]["far"] for s in seeds]
    error = float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return found | {"standard_error": error, "long_range": found["mean"] > ERRORS * error}


def recovered(by: dict[str, dict[int, dict]], arm: str) -> dict | None:
    """The share of the gap that an arm recovers, with its 95 % interval."""
    seeds = sorted(by[arm].keys() & by.get(FULL, {}).keys() & by.get(SLIDING, {}).keys())
    if arm in (FULL, SLIDING) or len(seeds) < 2:
        return None
    ours = [by[SLIDING][s]["far"] - by[arm][s]["far"] for s in seeds]
    whole = [by[SLIDING][s]["far"] - by[FULL][s]["far"] for s in seeds]
    share, low, high = stats.ratio(ours, whole)
    bounded = math.isfinite(low)
    verdict = "met" if share >= SHARE else "missed"
    if not bounded or low < SHARE <= high:
        verdict += ", not certain"
    ends = {"low": low, "high": high} if bounded else {"low": None, "high": None}
    return {"share": share, **ends, "pairs": len(seeds), "verdict": verdict}


def compared(found: list[dict]) -> dict[str, Any]:
    """The gap, and a line per arm, the best bits/byte first."""
    corpora = {r["manifest"] for r in found}
    if len(corpora) > 1:
        raise ValueError(f"manifest: runs saw different corpora, {', '.join(sorted(corpora))}")
    by: dict[str, dict[int, dict]] = {}
    for r in found:
        by.setdefault(r["arm"], {})[r["seed"]] = r
    whole, table = gap(by), []
    for arm, runs in by.items():
        line: dict[str, Any] = {"arm": arm, "seeds": len(runs)}
        line |= {k: float(np.mean([r[k] for r in runs.values()])) for k in (*SUMMARY, *FLOPS)}
        line["far"] = float(np.mean([r["far"] for r in runs.values()]))
        for base in (FULL, SLIDING):
            line[f"bits_to_{base}"] = against(by, arm, base, "bits_per_byte")
            line[f"far_to_{base}"] = against(by, arm, base, "far")
        if DENSE.get(arm) in by:
            line["dense"] = DENSE[arm]
            line["bits_to_dense"] = against(by, arm, DENSE[arm], "bits_per_byte")
            line["far_to_dense"] = against(by, arm, DENSE[arm], "far")
        if whole and whole["long_range"]:
            line["recovered"] = recovered(by, arm)
        shared = sorted(runs.keys() & by.get(FULL, {}).keys())
        pace = "tokens_per_second"
        if shared:
            line["pace"] = float(np.median([runs[s][pace] / by[FULL][s][pace] for s in shared]))
        line["by_position"] = mean_curve(r["by_position"] for r in runs.values())
        table.append(line)
    return {"gap": whole, "table": sorted(table, key=lambda r: r["bits_per_byte"])}


def mean_curve(curves: Iterable[list[dict]]) -> list[dict]:
    """Buckets with their mean over runs."""
    return [
        {**parts[0], "nats_per_token": float(np.mean([b["nats_per_token"] for b in parts]))}
        for parts in zip(*curves, strict=True)
    ]


def shown(difference: dict | None) -> str:
    """A paired difference as text; a tie is called one."""
    if difference is None:
        return ""
    d = difference
    return f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] {d['verdict']}"


def verdicts(result: dict) -> list[str]:
    """What the rule says of the runs, a sentence per line."""
    whole = result["gap"]
    if whole is None:
        return [f"no verdict: it takes two seeds of both {FULL} and {SLIDING}"]
    error = whole["standard_error"]
    size = f"{whole['mean']:+.4f} nats/token, {whole['mean'] / error:.1f} standard errors"
    lines = [f"beyond position {FAR}, {SLIDING} less {FULL}: {size}, {whole['pairs']} seeds"]
    if not whole["long_range"]:
        lines.append(
            f"not more than {ERRORS:g}: this text has no long range for this model, and the recall "
            "tasks decide"
        )
        return lines
    for line in result["table"]:
        share = line.get("recovered")
        if share:
            ends = "unbounded"
            if share["low"] is not None:
                ends = f"[{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
            text = f"recovers {100 * share['share']:.0f} % {ends} of that"
            lines.append(f"{line['arm']}: {text}, {100 * SHARE:.0f} % {share['verdict']}")
    return lines


def show(result: dict) -> None:
    """Prints the table and the verdicts."""
    columns = ("arm", "bits/byte", f"to {FULL}, 95 %", f"to {SLIDING}, 95 %", f"past {FAR}")
    width = (9, 9, 34, 34, 9)
    head = [c.ljust(w) for c, w in zip(columns, width, strict=True)]
    print(*head, "MFLOPs tokens/s  pace params")
    for r in result["table"]:
        texts = (r["arm"], f"{r['bits_per_byte']:.4f}", shown(r[f"bits_to_{FULL}"]))
        texts += (shown(r[f"bits_to_{SLIDING}"]), f"{r['far']:.4f}")
        print(
            *(t.ljust(w) for t, w in zip(texts, width, strict=True)),
            f"{r['train_flops_per_token'] / 1e6:6.2f} {r['tokens_per_second']:8.0f} "
            f"{r.get('pace', math.nan):5.2f} {r['total_params']:.0f}",
        )
    print(f"\nnats/token past {FAR}, paired")
    for r in result["table"]:
        texts = [shown(r[f"far_to_{base}"]) for base in (FULL, SLIDING)]
        print(r["arm"].ljust(9), *(t.ljust(34) for t in texts))
        if "dense" in r:
            bits, beyond = shown(r["bits_to_dense"]), shown(r["far_to_dense"])
            print(f"{r['arm']} to {r['dense']}: {beyond}; bits/byte {bits}")
    print()
    print("\n".join(verdicts(result)))


def plot(result: dict, file: Path) -> None:
    """Loss by position of every arm, as it differs from full attention's."""
    from matplotlib.figure import Figure

    curves = {r["arm"]: r["by_position"] for r in result["table"]}
    base = curves.get(FULL)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, buckets in curves.items():
        middle = [(b["from"] + b["to"]) / 2 for b in buckets]
        loss = np.array([b["nats_per_token"] for b in buckets])
        if base:
            loss = loss - [b["nats_per_token"] for b in base]
        axes.plot(middle, loss, marker="o", markersize=3.5, linewidth=1.2, label=arm)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0f}")
    axes.set_xlabel("tokens of the document before it")
    axes.set_ylabel("nats/token" + (f" less {FULL}'s" if base else ""))
    axes.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file)


def main() -> None:
    """Writes the JSON and the plot, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/attention_bakeoff"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="svg or png (default: NAME.svg)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where the JSON goes")
    options = parser.parse_args()
    found = rows(options.folder)
    if not found:
        parser.error(f"{options.folder} holds no finished run")
    tuning = len({(r["arm"], r["seed"]) for r in found}) < len(found)
    if tuning:
        best = rates(found)
        result: dict[str, Any] = {"rates": best}
        print(f"RATES = {best}")
    else:
        result = compared(found)
        show(result)
        file = options.plot or Path(f"{options.folder.name}.svg")
        plot(result, file)
        print(f"\nplot: {file}")
    text = json.dumps(result | {"rows": found}, indent=1)
    (options.out / f"{options.folder.name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
