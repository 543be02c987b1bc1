"""Runs claims one after the other, each to its verdict, and leaves out what is measured already."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_pretrain.claims import base, bench, results
from sparse_pretrain.scaling.published import files


class Verdict(NamedTuple):
    """What became of a claim: `text` is what was measured, or why it did not run."""

    claim: base.Claim
    verdict: str
    text: str
    result: dict[str, Any] | None
    skipped: bool


def run_claim(
    claim: base.Claim,
    where: Path,
    runs: Path,
    *,
    scale: str = "laptop",
    again: bool = False,
    say: Callable[[str], None] = print,
) -> Verdict:
    """One claim to its verdict; its result goes to `where`, the models it trains under `runs`.

    What is measured with this code is not run again, and trained runs are found and resumed, unless
    `again`, which removes the claim's runs first.
    """
    before = results.read(where, claim, scale)
    if before is not None and not again and results.current(before, claim):
        return Verdict(claim, before["verdict"], before["measured"], before, True)
    folder = runs / (claim.name if scale == "laptop" else f"{claim.name}.{scale}")
    if again and folder.exists():
        shutil.rmtree(folder)
    place = bench.Bench(folder, scale, say)
    began = time.perf_counter()
    try:
        outcome = claim.measure(place)
    except (base.NotRun, files.Absent) as e:
        return Verdict(claim, base.NOT_RUN, str(e), None, False)
    except ModuleNotFoundError as e:
        return Verdict(claim, base.NOT_RUN, f"needs the module {e.name}", None, False)
    result = results.write(where, claim, place, outcome, time.perf_counter() - began)
    return Verdict(claim, result["verdict"], result["measured"], result, False)


def run_all(
    chosen: Sequence[base.Claim],
    where: Path,
    runs: Path,
    *,
    scale: str = "laptop",
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[Verdict]:
    """Every claim in turn, each verdict printed as it comes, and the report written at the end."""
    done = []
    for i, claim in enumerate(chosen, 1):
        say(f"[{i}/{len(chosen)}] {claim.id} {claim.title}")
        verdict = run_claim(claim, where, runs, scale=scale, again=again, say=say)
        say(f"  {describe(verdict)}")
        done.append(verdict)
    return done


def describe(found: Verdict) -> str:
    """The verdict with the measured number and its interval, in one line."""
    text = f"{found.verdict}: {found.text}"
    if found.result and found.result["interval"]:
        value, low, high = found.result["interval"]
        text += f"; {found.result['of']} {value:.4g} [{low:.4g}, {high:.4g}]"
    if found.skipped and found.result:
        text += f" (measured before, at {found.result['commit'][:7]})"
    return text


def as_json(found: Sequence[Verdict]) -> str:
    """For programs."""
    rows = [
        {"id": v.claim.id, "name": v.claim.name, "verdict": v.verdict, "text": v.text}
        | {"skipped": v.skipped, "result": v.result}
        for v in found
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False)
