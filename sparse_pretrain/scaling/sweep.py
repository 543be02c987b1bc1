"""Runs the children of a sweep one after the other, resumes what stopped, ranks what finished."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from sparse_pretrain.report import compare, workdir
from sparse_pretrain.scaling.children import SEED, Child, children
from sparse_pretrain.training.progress import clock, figures, si

PREFIX = (sys.executable, "-m", "sparse_pretrain", "train")
GRACE_SECONDS = 120  # what an interrupted child has for saving its checkpoint


RunChild = Callable[[Child, Callable[[], None]], int]


def spawn(child: Child, poll: Callable[[], None], prefix: Sequence[str] = PREFIX) -> int:
    """Run a child as a process of its own, its output in its log; returns the exit status.

    On Ctrl-C the child gets one interrupt and time to save, then the interrupt goes on.
    """
    child.log.parent.mkdir(parents=True, exist_ok=True)
    command = [*prefix, *child.arguments()]
    with open(child.log, "ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        # Its own session: the terminal's Ctrl-C must reach it once, through us, and not twice.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    poll()
        except BaseException:
            _stop(process)
            raise


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _last_words(log: Path, start: int) -> str:
    """The last line that a child printed in this attempt."""
    try:
        text = log.read_bytes()[start:].decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [x.strip() for x in text.splitlines() if x.strip() and not x.startswith("$ ")]
    return lines[-1].removeprefix("error: ") if lines else ""


def _cause(code: int, run: workdir.Run, words: str) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return run.cause or "ended without a result"
    return words or run.cause or f"exit status {code}"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turns a polite kill into what Ctrl-C does, so that a job scheduler leaves no orphan."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(child: Child) -> str:
    """What a running child is doing, from its files."""
    run = workdir.read(child.workdir, rows=False)
    if not run.metrics:
        return "starting"
    row, steps = run.metrics[-1], run.derived.get("steps")
    step, tokens, pace = (row.get(k) for k in ("step", "tokens", "tokens_per_second"))
    text = f"{step}/{steps or '?'}  {figures(row)}"
    if steps and step and tokens and pace:
        text += f"  ETA {clock((steps - step) * tokens / step / pace)}"
    return text


def _one(
    child: Child, place: str, run_child: RunChild, console: Console
) -> tuple[str, str, workdir.Run]:
    """Bring one child to its end: (status, cause, what its workdir says)."""
    before = workdir.read(child.workdir, rows=False)
    if before.status == "finished":
        return "finished", "", before
    pid = before.run.get("pid")
    if before.status == "running" and isinstance(pid, int):
        return "failed", f"process {pid} is training it already", before
    start = child.log.stat().st_size if child.log.exists() else 0
    title = f"{place} {child.label}"
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title)
            code = run_child(
                child, lambda: bar.update(task, description=f"{title}  {_line(child)}")
            )
    else:
        verb = "resuming" if workdir.is_workdir(child.workdir) else "running"
        console.print(f"{title}  {verb}", markup=False, highlight=False, soft_wrap=True)
        code = run_child(child, lambda: None)
    after = workdir.read(child.workdir, rows=False)
    if code == 0 and after.status == "finished":
        return "finished", "", after
    if after.run.get("status") == "interrupted":
        return "interrupted", after.cause or "stopped from outside; run again to resume", after
    return "failed", _cause(code, after, _last_words(child.log, start)), after


def run_sweep(
    file: Path | str,
    root: Path | str,
    run_child: RunChild = spawn,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run every child of a sweep file under `root`, and write `sweep.json` and `comparison.html`.

    Finished children are skipped; interrupted and failed ones run again in their workdir, which
    resumes them. Ctrl-C lets the running child save, and the same call goes on from there. The
    result is the content of `sweep.json`, with `interrupted` and, per child, `status` (finished,
    failed, interrupted or waiting) and `cause`.
    Errors: ValueError as `children`.
    """
    root, console = Path(root), console or Console()
    todo = children(file, root)
    root.mkdir(parents=True, exist_ok=True)
    states = {c.id: ("waiting", "") for c in todo}
    interrupted = False
    for i, child in enumerate(todo, 1):
        place = f"[{i}/{len(todo)}]"
        try:
            with _terminable():
                status, cause, run = _one(child, place, run_child, console)
        except KeyboardInterrupt:
            states[child.id] = ("interrupted", "")
            interrupted = True
            break
        states[child.id] = (status, cause)
        end = cause or f"{run.result('bits_per_byte') or math.nan:.4f} bits/byte"
        text = f"{place} {child.label}  {status}: {end}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        _write(file, root, todo, states, interrupted=False)
    record = _write(file, root, todo, states, interrupted=interrupted)
    arms = gather(todo)
    title = f"Sweep {Path(file).stem}"
    compare.write_comparison(arms, root / "comparison.html", title)
    print_ranking(arms, console)
    for c in record["children"]:
        if c["status"] == "failed":
            text = f"failed: {c['label']}: {c['cause']} (log: {root / c['log']})"
            console.print(text, markup=False, highlight=False, soft_wrap=True, style="red")
    if interrupted:
        console.print("Interrupted; the same command goes on from here.", markup=False)
    console.print(f"Report: {root / 'comparison.html'}", markup=False, soft_wrap=True)
    return record


def gather(todo: Sequence[Child], *, rows: bool = True) -> list[compare.Arm]:
    """The children's runs by arm and seed, in the sweep's order: the first arm is the baseline."""
    names: dict[tuple[Any, ...], str] = {}
    arms: dict[str, dict[int, workdir.Run]] = {}
    for child in todo:
        if child.setting not in names:
            taken = child.arm in arms  # by an experiment of the same file name elsewhere
            names[child.setting] = f"{child.arm} ({child.id[:4]})" if taken else child.arm
        run = workdir.read(child.workdir, rows=rows)
        seed = child.overrides.get(SEED, run.config.get(SEED, 0))
        seed = seed if isinstance(seed, int) else 0
        arms.setdefault(names[child.setting], {})[seed] = run
    return [compare.Arm(name, runs) for name, runs in arms.items()]


def _write(
    file: Path | str,
    root: Path,
    todo: Sequence[Child],
    states: Mapping[str, tuple[str, str]],
    *,
    interrupted: bool,
) -> dict[str, Any]:
    """`sweep.json`, replaced whole after every child."""
    rows = []
    for child in todo:
        status, cause = states[child.id]
        row: dict[str, Any] = {"id": child.id, "label": child.label, "arm": child.arm}
        row |= {"experiment": child.experiment, "overrides": child.overrides}
        row |= {"workdir": child.workdir.name, "log": f"logs/{child.log.name}"}
        row |= {"status": status, "cause": cause}
        run = workdir.read(child.workdir, rows=False)
        if status == "finished":
            keys = ("bits_per_byte", "nats_per_token", "steps", "tokens", "flops", "wall_seconds")
            row |= {key: run.result(key) for key in (*keys, "tokens_per_second")}
            if run.result("accuracy") is not None:
                row["accuracy"] = run.result("accuracy")
            row["manifest_hash"] = run.manifest_hash
        rows.append(row)
    arms = gather(todo, rows=False)
    record = {
        "sweep": str(file),
        "interrupted": interrupted,
        "children": rows,
        "ranking": [
            {"arm": a.name, "bits_per_byte": a.mean(), "by_seed": a.values()}
            for a in compare.rank(arms)
            if a.values()
        ],
        "differences": [
            {"arm": d.arm, "baseline": d.baseline, "seeds": d.seeds}
            | (dataclasses.asdict(d.paired) if d.paired else {})
            for d in compare.differences(arms)
        ],
    }
    fresh = root / "sweep.json.tmp"
    fresh.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    os.replace(fresh, root / "sweep.json")
    return record


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
    for place, arm in enumerate(compare.rank(arms), 1):
        values = arm.values()
        row = [str(place) if values else "-", arm.name]
        row += [f"{arm.mean():.4f}" if values else "-", f"{len(values)}/{len(arm.runs)}"]
        row += [si(arm.mean("tokens")), si(arm.mean("tokens_per_second"))]
        if any(pairs.values()):
            row.append(str(pairs.get(arm.name) or ""))
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
