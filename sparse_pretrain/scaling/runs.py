"""The table of runs below a folder, and what differs between two of them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_pretrain.report import workdir
from sparse_pretrain.training import progress
from sparse_pretrain.training.progress import clock, si

RESULTS = (
    "bits_per_byte",
    "nats_per_token",
    "loss",
    "steps",
    "tokens",
    "tokens_per_second",
    "flops",
    "wall_seconds",
    "compile_seconds",
)
DERIVED = ("total_params", "active_params", "train_flops_per_token")
SETTINGS = 6  # keys that the table can still show; the files have them all
COLOURS = {"finished": "green", "failed": "red", "interrupted": "yellow", "running": "cyan"}


def describe(run: workdir.Run, price: float | None = None) -> dict[str, Any]:
    """One row of the table, as plain data; unknown numbers are None.

    FLOPs and chip-hours of a run that did not finish are those so far.
    Units: `price` of a chip-hour, in any currency, which is then that of `cost`.
    """
    row: dict[str, Any] = {"name": run.name, "workdir": str(run.path), "status": run.status}
    row |= {"cause": run.cause, "step": run.metrics[-1].get("step") if run.metrics else None}
    row |= {key: run.result(key) for key in RESULTS}
    row |= {key: run.derived.get(key) for key in DERIVED}
    row["steps"] = run.summary.get("steps") or run.derived.get("steps")
    for key in ("seed", "data.source"):
        row[key.rpartition(".")[2]] = workdir.dotted(run.config).get(key)
    row["manifest_hash"] = run.manifest_hash
    row |= {key: run.run.get(key) for key in ("commit", "created")}
    chips, hours = workdir.section(run.run, "device").get("count"), run.chip_hours
    row |= {"device": run.device or None, "chips": chips, "chip_hours": hours}
    row["cost"] = hours * price if price is not None and hours is not None else None
    if row["flops"] is None and row["tokens"] and row["train_flops_per_token"]:
        row["flops"] = row["tokens"] * row["train_flops_per_token"]
    return row


def _order(row: dict[str, Any], sort: str) -> tuple[bool, Any]:
    value = row[sort]
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    return (value is None, 0 if value is None else value)


def list_runs(
    root: Path | str, *, sort: str = "bits_per_byte", price: float | None = None
) -> list[dict[str, Any]]:
    """A row per workdir at or below `root`, sorted by the column `sort`, unknown values last.

    `config` holds what the runs do not agree on, by dotted key.
    Units: `price` as `describe`.
    Errors: ValueError when `root` is no folder or `sort` no column.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"runs: {root} is not a folder")
    columns = describe(workdir.read(root, rows=False))
    if sort not in columns:
        raise ValueError(f"sort: {sort!r} is not one of {', '.join(columns)}")
    found = [workdir.read(path, rows=False) for path in workdir.find(root)]
    settings = differing([workdir.dotted(run.config) for run in found])
    rows = [
        describe(run, price) | {"config": setting}
        for run, setting in zip(found, settings, strict=True)
    ]
    rows.sort(key=lambda row: row["workdir"])
    # Columns of mixed types exist in broken files only; they sort as text then.
    known = [row[sort] for row in rows if row[sort] is not None]
    if not any(all(isinstance(v, kind) for v in known) for kind in ((int, float), str)):
        return sorted(rows, key=lambda row: (row[sort] is None, str(row[sort])))
    return sorted(rows, key=lambda row: _order(row, sort))


def differing(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each configuration the keys on which they disagree, names left out; lacking ones are None.

    A run that never wrote a configuration is no disagreement.
    """
    known = [config for config in configs if config]
    keys = sorted({key for config in known for key in config} - {"name"})
    keys = [key for key in keys if len({repr(config.get(key)) for config in known}) > 1]
    return [{key: config.get(key) for key in keys} if config else {} for config in configs]


def _number(value: Any, digits: int = 4) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def _si(value: Any) -> str:
    return si(value) if isinstance(value, (int, float)) else "-"


def _steps(row: dict[str, Any]) -> str:
    if row["step"] is None or row["status"] == "finished":
        return _si(row["steps"])
    return f"{row['step']}/{row['steps'] or '?'}"


def print_runs(
    rows: Sequence[dict[str, Any]], *, as_json: bool = False, console: Console | None = None
) -> None:
    """The rows of `list_runs` as a table for people, or as one JSON list for programs."""
    console = console or progress.console()
    if as_json:
        text = json.dumps(rows, indent=1, ensure_ascii=False, default=str)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    if not rows:
        console.print("no runs here", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("status")
    priced = any(row.get("cost") is not None for row in rows)
    names = ["bits/byte", "steps", "tokens", "active", "tok/s", "time", "corpus"]
    for name in [*names, *(["cost"] if priced else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    keys = list(dict.fromkeys(key for row in rows for key in row.get("config", {})))
    told = 0 < len(keys) <= SETTINGS
    if told:
        table.add_column("differs in", overflow="fold")
    for row in rows:
        status = Text(row["status"], style=COLOURS.get(row["status"], ""))
        table.add_row(
            Text(_label(row)),
            status,
            _number(row["bits_per_byte"]),
            _steps(row),
            _si(row["tokens"]),
            _si(row["active_params"]),
            _si(row["tokens_per_second"]),
            clock(row["wall_seconds"]),
            (row["manifest_hash"] or "-")[:6],
            *([_number(row["cost"], 2)] if priced else []),
            *([Text(_setting(row["config"]))] if told else []),
        )
    console.print(table)
    for row in rows:
        if row["cause"]:
            note = Text(f"{row['workdir']}: {row['cause']}", style=COLOURS.get(row["status"], ""))
            console.print(note, soft_wrap=True)
    if len({row["manifest_hash"] for row in rows} - {""}) > 1:
        console.print(
            "The runs saw different corpora: bits/byte compare only where the corpus is the same.",
            style="yellow",
            soft_wrap=True,
        )


def _setting(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={_value(v)}" for key, v in config.items() if v is not None)


def _label(row: dict[str, Any]) -> str:
    folder = Path(row["workdir"]).name
    return folder if row["name"] in folder else f"{folder} ({row['name']})"


def diff(a: Path | str, b: Path | str) -> dict[str, Any]:
    """What differs between two runs: `config` and `results` as lists of (key, in a, in b).

    `comparable` is False when the runs saw different corpora. A key that one run lacks is None
    there, and also counts as a difference.
    Errors: ValueError when a folder holds no run.
    """
    runs = []
    for path in (Path(a), Path(b)):
        if not workdir.is_workdir(path):
            raise ValueError(f"runs diff: {path} holds no run")
        runs.append(workdir.read(path, rows=False))
    configs = [workdir.dotted(run.config) for run in runs]
    results = [describe(run) for run in runs]
    keys = ("status", *RESULTS, *DERIVED, "manifest_hash", "commit")
    hashes = [run.manifest_hash for run in runs]
    return {
        "a": str(runs[0].path),
        "b": str(runs[1].path),
        "config": _changes(configs[0], configs[1], sorted(configs[0].keys() | configs[1].keys())),
        "results": _changes(results[0], results[1], keys),
        "comparable": hashes[0] == hashes[1],
    }


def _changes(
    a: dict[str, Any], b: dict[str, Any], keys: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    return [(k, a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k) or (k in a) != (k in b)]


def print_diff(
    found: dict[str, Any], *, as_json: bool = False, console: Console | None = None
) -> None:
    """The answer of `diff` for people, or as one JSON object for programs."""
    console = console or progress.console()
    if as_json:
        text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    names = [Path(found[k]).name for k in ("a", "b")]
    for part in ("config", "results"):
        if not found[part]:
            console.print(f"{part}: no difference", markup=False)
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(part, overflow="fold")
        for name in names:
            table.add_column(Text(name), justify="right", overflow="fold")
        if part == "results":
            table.add_column("change", justify="right")
        for key, x, y in found[part]:
            row = [Text(key), Text(_value(x)), Text(_value(y))]
            table.add_row(*row, *([_change(x, y)] if part == "results" else []))
        console.print(table)
    if not found["comparable"]:
        console.print("The runs saw different corpora: their bits/byte do not compare.")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)


def _change(x: Any, y: Any) -> str:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (x, y))
    return f"{100 * (y / x - 1):+.2f} %" if numbers and x else ""
