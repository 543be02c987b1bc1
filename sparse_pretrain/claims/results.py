"""Verdicts on disk: one small JSON file a claim and scale, written when the experiment is done."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from sparse_pretrain.claims import base, bench

PACKAGES = ("sparse_pretrain", "kernels_pallas")


def folder() -> Path:
    """Where the results are that ship with the claims."""
    return base.folder().parent / "results" / "claims"


def path(where: Path, claim: base.Claim, scale: str) -> Path:
    """The file of a claim at a scale; what trains nothing has one for all scales."""
    suffix = "" if scale == "laptop" or claim.section != "C" else f".{scale}"
    return where / f"{claim.name}{suffix}.json"


def read(where: Path, claim: base.Claim, scale: str) -> dict[str, Any] | None:
    """The result of a claim, None where there is none. Errors: ValueError for a damaged file."""
    file = path(where, claim, scale)
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file}: is no JSON ({e}); remove it and run {claim.command}") from None


def write(
    where: Path, claim: base.Claim, bench: bench.Bench, outcome: base.Outcome, seconds: float
) -> dict[str, Any]:
    """Writes and returns the result of a claim that has just run for `seconds`."""
    from sparse_pretrain.training import metrics, record

    environment = record.environment()
    result = {
        "id": claim.id,
        "name": claim.name,
        "verdict": base.verdict(outcome.passed),
        "measured": outcome.measured,
        "interval": outcome.interval,
        "of": outcome.of,
        "criterion": claim.criterion,
        "published": claim.published,
        "analysis": outcome.analysis,
        "scale": bench.scale,
        "flops": bench.flops,
        "minutes": (bench.seconds or seconds) / 60,
        "code": claim.code,
        "commit": record.commit(),
        "run_commits": sorted(bench.commits),
        "device": environment["device"],
        "versions": environment["versions"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": claim.command + ("" if bench.scale == "laptop" else f" --scale={bench.scale}"),
        "numbers": outcome.numbers,
    }
    where.mkdir(parents=True, exist_ok=True)
    file = path(where, claim, bench.scale)
    text = json.dumps(metrics.plain(result), indent=1, allow_nan=False, ensure_ascii=False)
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(text + "\n", encoding="utf-8")
    os.replace(fresh, file)
    return json.loads(text)


def current(result: dict[str, Any], claim: base.Claim) -> bool:
    """Whether the result is of this claim's code and of these packages as they are now."""
    if result.get("code") != claim.code:
        return False
    root = base.folder().parents[1]
    if not (root / ".git").exists():
        return True
    commit = str(result.get("commit", ""))
    if not commit or commit.endswith("+") or commit == "unknown":
        return False
    command = ["git", "-C", str(root), "diff", "--quiet", commit, "--", *PACKAGES]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    return done.returncode == 0
