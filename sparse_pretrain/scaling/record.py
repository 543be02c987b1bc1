"""What a sweep leaves: sweep.json, the arms by what they reached, and the printed ranking."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_pretrain.report import compare, workdir
from sparse_pretrain.scaling.children import SEED, Child
from sparse_pretrain.training.progress import si

FILE = "sweep.json"
PRINTED = 30  # arms; the page and sweep.json have them all
RESULTS = (
    "bits_per_byte",
    "nats_per_token",
    "steps",
    "tokens",
    "flops",
    "wall_seconds",
    "tokens_per_second",
)


@dataclasses.dataclass
class State:
    """Where a child stands: waiting, running, finished, pruned, interrupted or failed.

    `causes` are those of the attempts that did not finish, oldest first.
    """

    status: str = "waiting"
    cause: str = ""
    run: workdir.Run | None = None
    attempts: int = 0
    causes: list[str] = dataclasses.field(default_factory=list)


def gather(
    todo: Sequence[Child], *, rows: bool = True, known: Mapping[str, workdir.Run] | None = None
) -> list[compare.Arm]:
    """The children's runs by arm and seed, in the sweep's order: the first arm is the baseline."""
    names: dict[tuple[Any, ...], str] = {}
    arms: dict[str, dict[int, workdir.Run]] = {}
    for child in todo:
        if child.setting not in names:
            taken = child.arm in arms  # by an experiment of the same file name elsewhere
            names[child.setting] = f"{child.arm} ({child.id[:4]})" if taken else child.arm
        run = (known or {}).get(child.id) or workdir.read(child.workdir, rows=rows)
        seed = child.overrides.get(SEED, run.config.get(SEED, 0))
        seed = seed if isinstance(seed, int) else 0
        arms.setdefault(names[child.setting], {})[seed] = run
    return [compare.Arm(name, runs) for name, runs in arms.items()]


def build(
    file: Path | str,
    todo: Sequence[Child],
    states: Mapping[str, State],
    searches: Sequence[Mapping[str, Any]],
    *,
    interrupted: bool,
) -> dict[str, Any]:
    """The content of `sweep.json`."""
    rows = []
    for child in todo:
        state = states[child.id]
        row: dict[str, Any] = {"id": child.id, "label": child.label, "arm": child.arm}
        row |= {"experiment": child.experiment, "overrides": child.overrides}
        row |= {"workdir": child.workdir.name, "log": f"logs/{child.log.name}"}
        row |= {"status": state.status, "cause": state.cause}
        row |= {"attempts": state.attempts, "causes": state.causes}
        run = state.run
        if state.status == "finished" and run is not None:
            row |= {key: run.result(key) for key in RESULTS}
            if run.result("accuracy") is not None:
                row["accuracy"] = run.result("accuracy")
            row |= {"manifest_hash": run.manifest_hash, "commit": run.run.get("commit")}
        rows.append(row)
    runs = {id: s.run for id, s in states.items() if s.run is not None}
    seen = [child for child in todo if child.id in runs]
    arms = gather(seen, rows=False, known=runs)
    record = {"sweep": str(file), "interrupted": interrupted, "children": rows}
    if searches:
        record["searches"] = list(searches)
    return record | {
        "ranking": [
            {"arm": a.name, "bits_per_byte": a.mean(), "by_seed": a.values()}
            for a in compare.rank(arms)
            if a.values()
        ],
        "differences": [
            {"arm": d.arm, "baseline": d.baseline, "seeds": d.seeds}
            | (dataclasses.asdict(d.paired) if d.paired else {})
            for d in compare.differences(arms)
        ]
        if arms
        else [],
    }


def write(record: Mapping[str, Any], root: Path) -> None:
    """`sweep.json`, replaced whole."""
    fresh = root / (FILE + ".tmp")
    fresh.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    os.replace(fresh, root / FILE)


def print_ranking(arms: Sequence[compare.Arm], console: Console) -> None:
    """The arms by held-out bits/byte, with the paired difference to the first of the sweep."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right")
    table.add_column("arm", overflow="fold")
    for name in ("bits/byte", "runs", "tokens", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    pairs = {d.arm: d.paired for d in compare.differences(arms)}
    if any(pairs.values()):
        table.add_column(f"against {arms[0].name}", justify="right", overflow="fold")
    for place, arm in enumerate(compare.rank(arms)[:PRINTED], 1):
        values = arm.values()
        row = [str(place) if values else "-", arm.name]
        row += [f"{arm.mean():.4f}" if values else "-", f"{len(values)}/{len(arm.runs)}"]
        row += [si(arm.mean("tokens")), si(arm.mean("tokens_per_second"))]
        if any(pairs.values()):
            row.append(str(pairs.get(arm.name) or ""))
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if len(arms) > PRINTED:
        console.print(f"... and {len(arms) - PRINTED} more arms", markup=False, highlight=False)
