"""Iso-FLOP grids: which sizes and tokens to train at each budget, as a sweep file and a record."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        tried = list(widths) or _widths(base)
        family = sizes.family(arm, tried, given, held.vocab)
        most = held.train_tokens
        found = points(arm, family, sorted(budgets), most_tokens=most, count=count, ratio=ratio)
        out += [dataclasses.replace(p, overrides=given | p.overrides) for p in found]
    return sorted(out, key=lambda p: p.budget)


def _widths(base: configs.Experiment) -> list[int]:
    """Widths about the experiment's own at which its heads are whole."""
    found = []
    for factor in (1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4):
        width = round(base.model.width * factor)
        try:
            sizes.resize(base, width)
        except ValueError:
            continue
        found.append(width)
    return found


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


def inline(file: Path, root: Path, say: Any = print) -> list[str]:
    """Train a sweep file's unfinished children one after the other in this process.

    For runs of seconds: a process of its own costs each of them more than its training. Finished
    ones are skipped and stopped ones resumed, as `sweep` does with the same folder. Returns a line
    for each that failed.
    """
    from sparse_pretrain.report import workdir
    from sparse_pretrain.scaling import children
    from sparse_pretrain.training import loop, recovery

    todo, failed = children.children(file, root), []
    for i, child in enumerate(todo, 1):
        if workdir.read(child.workdir, rows=False).status == "finished":
            continue
        say(f"[{i}/{len(todo)}] {child.label}")
        given = [flag.removeprefix("--config.") for flag in child.arguments()[1:-1]]
        try:
            experiment = configs.resolve(child.config, given)
            argv = ["sparse-pretrain", "train", *child.arguments()]
            summary = loop.train(experiment, child.workdir, argv, quiet=True)
            say(f"[{i}/{len(todo)}] {summary['bits_per_byte']:.4f} bits/byte")
        except recovery.Interrupted:
            raise
        except (ValueError, RuntimeError) as e:
            failed.append(f"{child.label}: {e}")
            say(f"failed: {failed[-1]}")
    return failed
