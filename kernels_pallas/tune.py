"""Search the block sizes of an op on this device and write them where its backends look.

Every alternative takes its turn in every round beside the backend's own guess. Backends that ask
for block sizes are traced once to learn what they ask; those that ask for several are searched one
after the other. What beats the guess goes to `tuned/<device_kind>/<op>.json`, after each workload,
so that a search that was cut short keeps what it found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels_pallas import bench, blocks, command, device
from kernels_pallas.cases import DIRECTIONS, Case, cases

EXAMPLES = """examples:
  python -m kernels_pallas.tune --op cross_entropy
  python -m kernels_pallas.tune --op grouped_matmul --backend mosaic_gpu --spec olmoe
  python -m kernels_pallas.tune --op cross_entropy --folder found    # to look at, not to use

A call's own argument comes before the file, and the file before the backend's guess. An
alternative is taken when its median is lowest and it beat the guess in three rounds of four.
Training never tunes.

exit status: 0 when all was searched, 1 when a backend failed, 2 for arguments."""

# Share of the rounds in which the best must beat the guess.
_CONVINCING = 0.75


class Found(NamedTuple):
    """The outcome of one search. Units: seconds."""

    request: blocks.Request
    best: blocks.Blocks
    guess_seconds: float
    best_seconds: float
    failed: list[str]  # alternatives that do not compile or run, and why


def requests(case: Case, made: Any, direction: str, backend: str) -> list[blocks.Request]:
    """Return what the backend asks for on this workload, by tracing it."""
    arguments, keywords = made
    arrays = {k: x for k, x in keywords.items() if isinstance(x, jax.Array)}
    options = {k: x for k, x in keywords.items() if k not in arrays}
    with blocks.recorded() as asked:
        forward = case.function("forward", options, backend)
        out = jax.eval_shape(forward, arguments, arrays, None)
        if direction == "gradient":
            jax.eval_shape(case.function(direction, options, backend), arguments, arrays, out)
    return list(asked.values())


def search(case: Case, made: Any, direction: str, backend: str, request: blocks.Request,
           settled: dict[blocks.Name, blocks.Blocks], rounds: int) -> Found:
    """Time the alternatives of one request by turns, all other requests as settled."""
    arguments, keywords = made
    arrays = {k: x for k, x in keywords.items() if isinstance(x, jax.Array)}
    options = {k: x for k, x in keywords.items() if k not in arrays}
    failed: list[str] = []
    running: list[tuple[blocks.Blocks, Callable[[], Any], int, list[float]]] = []
    for choice in (request.guess, *request.others):
        row = bench.Row(case.op.name, case.spec, direction, backend)
        with blocks.trying(settled | {request.name: choice}):
            try:
                call, _ = bench.prepare(case, direction, row, arguments, arrays, options)
                running.append((choice, call, bench.batch(call), []))
            except Exception as e:  # an alternative may be too large for the device
                if choice == request.guess:
                    raise
                failed.append(f"{choice}: {type(e).__name__}: {e}".splitlines()[0])
    for _ in range(rounds):
        for _, call, times, seconds in running:
            seconds.append(bench.timed(call, times))
    guess = running[0][3]
    choice, _, _, best = min(running, key=lambda r: statistics.median(r[3]))
    wins = sum(b < g for b, g in zip(best, guess, strict=True))
    if wins < _CONVINCING * rounds:
        choice, best = request.guess, guess
    return Found(request, choice, statistics.median(guess), statistics.median(best), failed)


def keep(path: Path, case: Case, direction: str, found: Sequence[Found], rounds: int) -> None:
    """Put what was found in the op's file, in place of what it said of these workloads."""
    whole = blocks.load(path)
    names = {f.request.name for f in found}
    entries = [e for e in whole["entries"] if
               blocks.name_of(case.op.name, e["backend"], e["workload"]) not in names]
    for f in found:
        if f.best != f.request.guess:
            _, backend, workload = f.request.name
            entries.append({
                "backend": backend, "workload": json.loads(workload), "blocks": f.best,
                "guess": f.request.guess, "spec": case.spec, "direction": direction,
                "milliseconds": {"guess": round(1e3 * f.guess_seconds, 4),
                                 "tuned": round(1e3 * f.best_seconds, 4)},
                "rounds": rounds, "jax": jax.__version__})
    blocks.store(path, {"op": case.op.name, "device": device.target().kind,
                        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
                        "entries": entries})


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("tune", __doc__, EXAMPLES)
    command.add_workloads(parser, specs="SPEED",
                          backends="all that run here and ask for block sizes,")
    parser.add_argument("--direction", default="gradient", choices=DIRECTIONS,
                        help="what is timed (gradient, which is forward and backward)")
    parser.add_argument("--rounds", type=int, default=12, help="timed batches of each (12)")
    parser.add_argument("--folder", type=Path, metavar="DIR",
                        help="write there (the package's tuned/, where backends look)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.rounds < 4:
        parser.error(f"--rounds {asked.rounds}: three of four must be won, so at least 4")
    try:
        chosen = list(cases(tuple(asked.op), tuple(asked.spec), speed=not asked.spec))
        folder = (asked.folder or blocks.FOLDER) / device.kind()
        for case in chosen:
            blocks.load(folder / f"{case.op.name}.json")
    except ValueError as e:
        parser.error(str(e))
    command.check_backends(parser, asked.backend, chosen)
    broken = searched = 0
    for case in chosen:
        made = case.make()
        refusals = case.op.explain(*made[0], **made[1])
        direction = asked.direction if case.wrt else "forward"
        for name, reason in refusals.items():
            where = f"{case.op.name} {case.spec} {name}"
            if reason is not None:
                if name in asked.backend:
                    print(f"{where}: refused: {reason}")
                continue
            if name == "reference" or (asked.backend and name not in asked.backend):
                continue
            settled: dict[blocks.Name, blocks.Blocks] = {}
            found = []
            try:
                for request in requests(case, made, direction, name):
                    f = search(case, made, direction, name, request, settled, asked.rounds)
                    settled[request.name] = f.best
                    found.append(f)
                    searched += 1
                    tried = 1 + len(request.others) - len(f.failed)
                    print(f"{where} {request.name[2]}: {f.best} {1e3 * f.best_seconds:.4g} ms, "
                          f"guess {request.guess} {1e3 * f.guess_seconds:.4g} ms, "
                          f"{tried} tried", flush=True)
                    for line in f.failed:
                        print(f"{where}: {line}", file=sys.stderr)
            except Exception as e:  # of any backend: the others are still wanted
                broken += 1
                print(f"FAILED {where}: {type(e).__name__}: {e}".splitlines()[0])
            if found:
                keep(folder / f"{case.op.name}.json", case, direction, found, asked.rounds)
    if not searched and not broken:
        print("kernels_pallas.tune: no backend that runs here asks for block sizes of these",
              file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
