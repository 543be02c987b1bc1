"""Iso-FLOP grids: which sizes and tokens to train at each budget, as a sweep file and a record."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain import config as configs
from sparse_pretrain import data
from sparse_pretrain.scaling import sizes

POINTS = 4  # sizes per budget
RATIO = 20.0  # tokens per parameter where a grid is centred: Hoffmann et al. (2203.15556)
FEWEST_STEPS = 20
PLAN, SWEEP = "plan.json", "sweep_file.py"


@dataclasses.dataclass(frozen=True)
class Point:
    """A run of the grid. Units: `budget` FLOPs asked for, `flops` those of whole steps."""

    arm: str
    budget: float
    width: int
    params: float
    total_params: int
    active_params: int
    tokens: int
    flops: float
    overrides: dict[str, Any]


def points(
    arm: str,
    family: Sequence[sizes.Size],
    budgets: Sequence[float],
    *,
    most_tokens: int,
    count: int = POINTS,
    ratio: float = RATIO,
) -> list[Point]:
    """Per budget the `count` sizes nearest to `ratio` tokens per parameter that the data allows.

    No run sees a token twice: a size that would need more than `most_tokens` is left out.
    Errors: ValueError naming the budget and the data when fewer than three sizes are possible.
    """
    out = []
    for budget in budgets:
        fits = []
        for size in family:
            steps = round(budget / (6 * size.params) / size.tokens_per_step)
            tokens = steps * size.tokens_per_step
            if steps >= FEWEST_STEPS and tokens <= most_tokens:
                fits.append((abs(math.log(tokens / size.params / ratio)), size, tokens))
        if len(fits) < 3:
            raise ValueError(
                f"budgets: {budget:.3g} FLOPs can train {len(fits)} of the {len(family)} sizes for "
                f"{FEWEST_STEPS} steps or more within {most_tokens} tokens; a budget needs 3 sizes"
            )
        chosen = sorted(sorted(fits, key=lambda f: f[0])[:count], key=lambda f: f[1].width)
        for _, size, tokens in chosen:
            out.append(
                Point(
                    arm=arm,
                    budget=budget,
                    width=size.width,
                    params=size.params,
                    total_params=size.total_params,
                    active_params=size.active_params,
                    tokens=tokens,
                    flops=6 * size.params * tokens,
                    overrides=size.overrides | {"steps": tokens // size.tokens_per_step},
                )
            )
    return out


def plan(
    arms: Sequence[str],
    budgets: Sequence[float],
    *,
    widths: Sequence[int] = (),
    overrides: dict[str, Any] | None = None,
    count: int = POINTS,
    ratio: float = RATIO,
) -> list[Point]:
    """The grid of every arm (an experiment, as `--config` takes it), cheapest budget first.

    Without `widths`: the experiment's own, and a quarter to four times it.
    Errors: ValueError naming the field.
    """
    if not budgets or min(budgets) <= 0:
        raise ValueError(f"budgets: must be positive FLOPs, got {list(budgets)}")
    given = overrides or {}
    out: list[Point] = []
    for arm in arms:
        base = configs.resolve(arm, [f"{k}={v}" for k, v in given.items()])
        held = data.load(base.data, seed=base.seed)
        tried = list(widths) or sizes.widths(base)
        family = sizes.family(arm, tried, given, held.vocab)
        most = held.train_tokens
        found = points(arm, family, sorted(budgets), most_tokens=most, count=count, ratio=ratio)
        out += [dataclasses.replace(p, overrides=given | p.overrides) for p in found]
    return sorted(out, key=lambda p: p.budget)


def write(root: Path, grid: Sequence[Point]) -> Path:
    """`plan.json` and the sweep file of a grid in `root`; returns the sweep file.

    Errors: ValueError when `root` holds another grid's plan.
    """
    root.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(p) for p in grid]
    path = root / PLAN
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(rows)):
        raise ValueError(f"workdir: {root} holds another grid; give a new --workdir")
    path.write_text(json.dumps(rows, indent=1) + "\n")
    pairs = [(p.arm, p.overrides) for p in grid]
    body = ",\n    ".join(repr(pair) for pair in pairs)
    text = f'"""Written by sparse-pretrain isoflop."""\n\nPAIRS = [\n    {body},\n]\n\n\n'
    text += 'def get_sweep():\n    """The grid."""\n    return PAIRS\n'
    (root / SWEEP).write_text(text)
    return root / SWEEP


def run(file: Path, root: Path, *, workers: int = 1, warm: bool = True, console: Any = None) -> Any:
    """Train the grid through the sweep machinery: resumable, finished runs skipped.

    `warm` keeps a worker's process for all its runs, as many are shorter than a start.
    Returns the sweep's record.
    """
    from sparse_pretrain.scaling import sweep
    from sparse_pretrain.scaling.engines import local

    engine = local.Local(workers=workers, warm=warm)
    return sweep.run_sweep(file, root, engine, workers=workers, console=console)


def read(root: Path) -> list[Point]:
    """The plan in a workdir. Errors: ValueError when it holds none."""
    path = root / PLAN
    if not path.is_file():
        raise ValueError(f"workdir: {root} holds no {PLAN}")
    return [Point(**row) for row in json.loads(path.read_text())]


def results(root: Path) -> list[dict[str, Any]]:
    """A row per finished run of the grid in `root`: its point, and what `workdirs.rows` says of it.

    Errors: ValueError as `read`.
    """
    from sparse_pretrain.scaling import children
    from sparse_pretrain.scaling.fit import workdirs

    grid = read(root)
    todo = children.children(root / SWEEP, root)
    found = {row["label"]: row for row in workdirs.rows(root)[0]}
    out = []
    for point, child in zip(grid, todo, strict=True):
        row = found.get(child.workdir.name)
        if row:
            out.append({"arm": point.arm, "budget": point.budget} | row)
    return out


def analyse(
    rows: Sequence[dict[str, Any]], *, bootstrap: int = 400, least_steps: int = 0
) -> dict[str, Any]:
    """What a grid's finished runs say: by arm the law, the parabolas and their bias, the next run;
    between the first arm and each other the efficiency leverage.

    An arm of too few runs has None for its law. `fits` holds the laws themselves. Runs of fewer
    than `least_steps` have hardly begun to learn: parabolas show them, the laws leave them out.
    """
    from sparse_pretrain.scaling.fit import leverage

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    said: dict[str, Any] = {"arms": {}, "leverage": {}, "fits": {}, "tables": {}}
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        said["arms"][arm], said["fits"][arm], said["tables"][arm] = _arm(
            arm, own, bootstrap, least_steps
        )
    first = said["fits"][arms[0]] if arms else None
    for arm in arms[1:]:
        other = said["fits"][arm]
        if first is not None and other is not None:
            edge = sorted({row["budget"] for row in rows})
            said["leverage"][arm] = [leverage.between(first, other, c) for c in edge]
    return said


def _arm(
    arm: str, rows: list[dict[str, Any]], bootstrap: int, least_steps: int
) -> tuple[dict[str, Any], Any, Any]:
    from sparse_pretrain.scaling.fit import accuracy, fitting, parabola, tables

    column = lambda key: np.array([row[key] for row in rows], np.float64)  # noqa: E731
    table = tables.Table(
        params=column("params"),
        tokens=column("tokens"),
        loss=column("loss"),
        labels=tuple(row["label"] for row in rows),
        source=f"{arm}, corpus {rows[0]['corpus']}",
    )
    budget = column("budget")
    enough = np.array([not least_steps or r["tokens"] / r["batch"] >= least_steps for r in rows])
    vertices = parabola.budgets(budget, table.params, table.loss)
    found: dict[str, Any] = {
        "runs": len(rows),
        "parabolas": vertices,
        "exponent": parabola.exponent(vertices),
        "stated_bias": parabola.STATED_BIAS,
        "least_steps": least_steps,
        "too_short": int((~enough).sum()),
    }
    try:
        fit = fitting.fit(table.take(enough), bootstrap=bootstrap)
    except ValueError as e:
        return found | {"law": None, "why": str(e)}, None, table
    curves = accuracy.of_rows(rows, bootstrap=bootstrap)
    fit = dataclasses.replace(fit, accuracy=tuple(curve.to_json() for curve in curves))
    found["law"] = fit.to_json(samples=False)
    found["accuracy"] = [
        {k: v for k, v in curve.items() if k != "samples"} for curve in fit.accuracy
    ]
    found["bias"] = parabola.bias(fit, budget, table.params)
    found["next"] = next_runs(fit, table)
    return found, fit, table


def next_runs(fit: Any, table: Any, beyond: float = 4.0) -> list[dict[str, Any]]:
    """The three runs worth buying next for a forecast at `beyond` times the largest budget.

    Candidates are sizes within and one step outside the fitted span at budgets up to `beyond` times
    the largest.
    """
    from sparse_pretrain.scaling.fit import design, laws

    edge = fit.span["flops"][1]
    target = laws.optimum(fit.theta, beyond * edge)
    low, high = fit.span["params"]
    pairs = [
        (float(size), float(flops / 6 / size))
        for flops in edge * np.array([0.1, 0.3, 1.0, 2.0, beyond])
        for size in np.geomspace(low / 1.5, high * 1.5, 9)
    ]
    pairs = [p for p in pairs if p[1] >= fit.span["tokens"][0]]
    rows = design.next_run(fit, pairs, (float(target[0]), float(target[1])))
    for row in rows[:3]:
        row["why"] = (
            f"of {len(rows)} runs tried on paper it takes most off the variance of the forecast at "
            f"{beyond:g} times the largest budget for its compute: half-width "
            f"{100 * row['half_width']:.2f} % to {100 * row['after']:.2f} % of the loss"
        )
    return rows[:3]
