"""Reads the files of a run, whatever state they are in."""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_pretrain.training.metrics import read_rows

MARKERS = ("run.json", "summary.json", "metrics.jsonl")
SILENT_SECONDS = 600  # a run that writes nothing for this long, and left no pid, is gone


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says about its run; absent or broken files give empty fields and a `cause`.

    `status` is running, finished, failed or interrupted; `cause` is one line, empty when well.
    """

    path: Path
    run: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    moe: list[dict[str, Any]]
    status: str
    cause: str

    @property
    def name(self) -> str:
        """The run's own name, else its folder's."""
        return str(self.run.get("name") or self.summary.get("name") or self.path.name)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, nested."""
        return section(self.run, "config")

    @property
    def derived(self) -> dict[str, Any]:
        """The numbers that followed from the configuration: steps, parameters, FLOPs."""
        return section(self.run, "derived")

    @property
    def manifest_hash(self) -> str:
        """The corpus that the results belong to; results compare within one hash only."""
        value = section(self.run, "manifest").get("hash") or self.summary.get("manifest_hash")
        return str(value or "")

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The evaluations, all of one set of targets: the last scores a larger one besides."""
        return [row | section(row, "between") for row in self.eval]

    @property
    def device(self) -> str:
        """What it was trained on: the accelerator's name, else the processor's."""
        found = section(self.run, "device")
        kind = found.get("kind")
        return str((found.get("cpu") or kind) if kind == "cpu" else kind or "")

    @property
    def chip_hours(self) -> float | None:
        """Hours of all its chips, as far as it got; None when not known."""
        chips, seconds = section(self.run, "device").get("count"), self.result("wall_seconds")
        launches = self.run.get("launches")
        if seconds is None and isinstance(launches, list):
            parts = [x.get("seconds") for x in launches if isinstance(x, dict)]
            seconds = sum(x for x in parts if isinstance(x, (int, float)))
        good = isinstance(chips, int) and isinstance(seconds, (int, float))
        return seconds * chips / 3600 if good else None

    def result(self, key: str) -> Any:
        """A final number: from the summary, else from the last row that has it, else None."""
        for row in (self.summary, *reversed(self.eval[-1:]), *reversed(self.metrics[-1:])):
            if row.get(key) is not None:
                return row[key]
        return None


def section(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`record[key]` when it is a mapping, else an empty one."""
    value = record.get(key)
    return dict(value) if isinstance(value, Mapping) else {}


def is_workdir(path: Path) -> bool:
    """Whether a folder holds a run, complete or not."""
    return any((path / name).is_file() for name in MARKERS)


def find(root: Path, depth: int = 4) -> Iterator[Path]:
    """The workdirs at or below `root`, sorted by path; does not look inside a workdir."""
    if is_workdir(root):
        yield root
        return
    if depth == 0:
        return
    try:
        below = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except (PermissionError, FileNotFoundError):
        return
    for path in below:
        if not path.is_symlink():
            yield from find(path, depth - 1)


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and what is wrong with the file if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError):
        return {}, f"{path.name} is unreadable"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} is not an object")


def _last_row(path: Path) -> list[dict[str, Any]]:
    """The last complete row, without reading a long file whole."""
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - (1 << 18)))
            lines = f.read().split(b"\n")[:-1]
    except OSError:
        return []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return [row]
    return []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _running(path: Path, run: Mapping[str, Any]) -> bool:
    pid = run.get("pid")
    if isinstance(pid, int) and pid > 0 and run.get("host") == platform.node():
        return _alive(pid)
    files = [path / name for name in ("run.json", "metrics.jsonl", "eval.jsonl")]
    newest = max((f.stat().st_mtime for f in files if f.exists()), default=0.0)
    return time.time() - newest < SILENT_SECONDS


def _status(
    path: Path, run: Mapping[str, Any], broken: str, summary: Mapping[str, Any], no_summary: str
) -> tuple[str, str]:
    if broken:
        return "failed", broken
    said = run.get("status")
    if said == "finished":
        return ("finished", "") if summary else ("failed", no_summary)
    if said == "running":
        return ("running", "") if _running(path, run) else ("interrupted", "stopped without a word")
    if said in ("failed", "interrupted"):
        lines = str(run.get("error") or "").strip().splitlines()
        return said, lines[-1] if lines else ""
    return "failed", f"run.json has the unknown status {said!r}"


def read(path: Path | str, *, rows: bool = True) -> Run:
    """The run in a workdir; with `rows=False` only the last row of each JSONL file is read."""
    path = Path(path)
    run, broken = _json(path / "run.json")
    summary, no_summary = _json(path / "summary.json")
    status, cause = _status(path, run, broken, summary, no_summary)
    reader = read_rows if rows else _last_row
    metrics, evals, moe = (reader(path / f"{n}.jsonl") for n in ("metrics", "eval", "moe"))
    return Run(
        path=path,
        run=run,
        summary=summary,
        metrics=metrics,
        eval=evals,
        moe=moe,
        status=status,
        cause=cause,
    )


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as {dotted key: value}, keys sorted within each section."""
    flat: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
