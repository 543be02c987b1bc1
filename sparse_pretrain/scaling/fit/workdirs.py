"""What a law needs of finished runs, read from their run.json and summary.json."""

import json
from pathlib import Path
from typing import Any

DONE = "finished"
TASKS = "tasks.json"  # in a workdir: what its checkpoint scored on multiple-choice tasks, by name


def rows(root: Path, depth: int = 4) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row per finished run at or below `root`, a line per run left out), sorted by folder.

    Units: `params` model FLOPs per token of training over 6; `total_params`, `active_params`
    parameters; `tokens` training targets, `batch` those of a step; `loss` held-out nats/token;
    `seconds` of training steps, `cpu_seconds` what the process's threads spent on them (None of
    older runs), `memory` bytes at the peak of the process; `tasks` maps a task to its accuracy,
    count and chance.
    """
    found: list[dict[str, Any]] = []
    left: list[str] = []
    for path in _find(root, depth):
        run, summary = (_json(path / name) for name in ("run.json", "summary.json"))
        if not run or run.get("status") != DONE or not summary:
            left.append(f"{path.name}: {(run or {}).get('status', 'no record')}")
            continue
        derived = run.get("derived") or {}
        flops, tokens, loss = (summary.get(k) for k in ("flops", "tokens", "nats_per_token"))
        if not (flops and tokens and loss):
            left.append(f"{path.name}: its summary lacks flops, tokens or nats_per_token")
            continue
        total, active = (derived.get(k) or 0 for k in ("total_params", "active_params"))
        found.append(
            {
                "label": path.name,
                "name": run.get("name"),
                "params": flops / tokens / 6,
                "tokens": float(tokens),
                "loss": float(loss),
                "bits_per_byte": summary.get("bits_per_byte"),
                "flops": float(flops),
                "total_params": total,
                "active_params": active,
                "expansion": total / active if active else None,
                "width": ((run.get("config") or {}).get("model") or {}).get("width"),
                "seed": (run.get("config") or {}).get("seed"),
                "batch": tokens / summary["steps"] if summary.get("steps") else None,
                "lr": ((run.get("config") or {}).get("optim") or {}).get("lr"),
                "seconds": summary.get("train_seconds"),
                "cpu_seconds": summary.get("train_cpu_seconds"),
                "tokens_per_second": summary.get("tokens_per_second"),
                "memory": summary.get("peak_memory_bytes"),
                "tasks": _tasks(path, run, summary),
                "corpus": summary.get("manifest_hash") or "",
                "commit": run.get("commit"),
            }
        )
    return found, left


def finished(root: Path, depth: int = 4) -> list[Path]:
    """The folders of the finished runs at or below `root`."""
    return [p for p in _find(root, depth) if (_json(p / "run.json") or {}).get("status") == DONE]


def _tasks(path: Path, run: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, count and chance by task: a synthetic source's own, and those of tasks.json."""
    found: dict[str, Any] = {}
    if summary.get("accuracy") is not None and summary.get("heldout_tokens"):
        source = ((run.get("config") or {}).get("data") or {}).get("source") or "synthetic"
        told = {"accuracy": summary["accuracy"], "count": summary["heldout_tokens"], "chance": 0.0}
        found[source] = told
    return found | (_json(path / TASKS) or {})


def _find(root: Path, depth: int):
    if (root / "run.json").is_file():
        yield root
        return
    if depth == 0 or not root.is_dir():
        return
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        yield from _find(path, depth - 1)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
