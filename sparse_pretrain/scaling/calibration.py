"""Forecasts of runs beyond a grid, written before the runs and scored after them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.scaling import forecast, isoflop
from sparse_pretrain.scaling.fit import laws, record

FACTORS = (1.5, 2.5, 4.0)  # times the grid's largest budget
FILE = "forecasts.json"
COSTS = ("seconds", "cpu_seconds", "memory")


def choose(
    grid: Sequence[isoflop.Point],
    beyond: Sequence[isoflop.Point],
    fits: Mapping[str, Any],
    count: int,
) -> list[isoflop.Point]:
    """`count` of the candidate points `beyond`, spread over arms and budgets, near each optimum.

    Errors: ValueError when an arm has no law, or there are fewer candidates.
    """
    arms = list(dict.fromkeys(p.arm for p in grid))
    lacking = [arm for arm in arms if fits.get(arm) is None]
    if lacking:
        raise ValueError(f"forecast: {lacking[0]} has no law yet; finish its grid first")
    ranked: list[list[isoflop.Point]] = []
    for arm in arms:
        theta = fits[arm].theta
        for budget in sorted({p.budget for p in beyond}):
            best = math.log(float(laws.optimum(theta, budget)[0]))
            own = [p for p in beyond if p.arm == arm and p.budget == budget]
            ranked.append(sorted(own, key=lambda p: abs(math.log(p.params) - best)))
    turns = [row[i] for i in range(max(map(len, ranked))) for row in ranked if i < len(row)]
    if len(turns) < count:
        raise ValueError(f"forecast: {count} runs asked for, {len(turns)} are possible")
    return sorted(turns[:count], key=lambda p: p.flops)


def write(
    root: Path,
    points: Sequence[isoflop.Point],
    fits: Mapping[str, record.Fit],
    rows: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The plan, sweep file and forecasts of `points` in `root`; forecasts there are never replaced.

    Each has the loss, seconds and memory with their 95 % intervals, and how far it reaches.
    Errors: ValueError when `root` holds forecasts already.
    """
    path = root / FILE
    if path.exists():
        raise ValueError(f"forecast: {path} is there already; a forecast is made once")
    found = []
    for p in points:
        own = [row for row in rows if row["arm"] == p.arm]
        said = forecast.loss(fits[p.arm], params=p.params, tokens=p.tokens)
        found.append(
            {"arm": p.arm, "width": p.width, "params": p.params, "tokens": p.tokens}
            | {"flops": p.flops, "overrides": p.overrides}
            | {k: said[k] for k in ("loss", "interval", "half_width", "validity", "accuracy")}
            | forecast.cost(own, p.params, p.tokens)
        )
    isoflop.write(root, points)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def score(root: Path) -> dict[str, Any]:
    """How many of the finished runs in `root` lie inside their forecasts' intervals.

    `of` counts those of which each was forecast and measured.

    Errors: ValueError when there is no forecast, or no run is finished.
    """
    path = root / FILE
    if not path.is_file():
        raise ValueError(f"forecast: {root} holds no {FILE}")
    made = json.loads(path.read_text())
    key = lambda row: (row["arm"], row["width"], round(row["tokens"]))  # noqa: E731
    done = {key(row): row for row in isoflop.results(root)}
    runs = []
    for said in made:
        row = done.get(key(said))
        if row is None:
            continue
        one = {
            k: said[k] for k in ("arm", "width", "params", "tokens", "flops", "loss", "interval")
        }
        one |= {"measured": row["loss"], "error": row["loss"] / said["loss"] - 1}
        one["loss_inside"] = _inside(row["loss"], said["interval"])
        for name in COSTS:
            if name in said and row.get(name) is not None:
                one |= {name: row[name], f"{name}_forecast": said[name]}
                one[f"{name}_interval"] = said[f"{name}_interval"]
                one[f"{name}_inside"] = _inside(row[name], said[f"{name}_interval"])
        answers = row.get("tasks") or {}
        for told in said.get("accuracy") or ():
            if told["accuracy"] is not None and told["task"] in answers:
                right = answers[told["task"]]["accuracy"]
                inside = _inside(right, told["interval"])
                one.setdefault("accuracy", []).append(told | {"measured": right, "inside": inside})
        if one.get("accuracy"):
            one["accuracy_inside"] = all(a["inside"] for a in one["accuracy"])
        runs.append(one)
    if not runs:
        raise ValueError(f"forecast: no run of {root} is finished")
    known = ("loss", *COSTS, "accuracy")
    held = {k: [r[f"{k}_inside"] for r in runs if f"{k}_inside" in r] for k in known}
    return {
        "forecast": len(made),
        "finished": len(runs),
        "inside": {k: sum(v) for k, v in held.items() if v},
        "of": {k: len(v) for k, v in held.items() if v},
        "runs": runs,
    }


def _inside(value: float, interval: Sequence[float]) -> bool:
    return interval[0] <= value <= interval[1]
