"""Measure all of it on this machine's accelerator: parity, then speed, until the time is up.

The one command for a chip that is at hand for minutes: every result is kept as it is done, a kernel
that hangs or takes the process down costs its own row, and the same command goes on later.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kernels_pallas import bench, command, device, parity, supervised
from kernels_pallas.cases import OPS, Case, cases
from kernels_pallas.compiled import sources, versions
from kernels_pallas.results import Result, page

EXAMPLES = """examples:
  python -m kernels_pallas.measure                      # ten minutes; again to go on
  python -m kernels_pallas.measure --op cross_entropy --seconds 120
  python -m kernels_pallas.measure --markdown > kernels_pallas/RESULTS.md   # runs nothing

First one small workload of each op with a kernel is held to float64, then everything that training
runs is timed, all backends by turns, then the other small workloads are held to float64. What is
kept for the same device, versions and source is not run again, but what failed is. On a machine
that is lent, copy the file back: --keep $OUT/measured.jsonl.

exit status: 0 when all that was asked is done, 3 when the time was up before, 1 when something
failed, 2 for arguments or where there is no accelerator (--cpu measures this machine's all the
same)."""

RECORD = Path(__file__).with_name("measured.jsonl")
_DEADLINE = "KERNELS_PALLAS_DEADLINE"  # seconds since the epoch, for the child processes
UNFINISHED = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """One workload, to be held to float64 ('parity') or timed ('forward', 'gradient')."""

    what: str
    case: Case

    @property
    def name(self) -> str:
        """Return what tells it from the others."""
        return f"{self.case.op.name} {self.case.spec} {self.what}"


def backends(case: Case) -> list[str]:
    """Return the backends of a case that this device would run, but the reference."""
    arguments, keywords = case.shapes()
    verdicts = case.op.explain(*arguments, **keywords)
    return [n for n, reason in verdicts.items() if reason is None and n != "reference"]


def jobs(ops: tuple[str, ...], *, cpu: bool = False) -> Iterator[Job]:
    """Yield what there is to do, the most telling first."""
    own = [case for case in cases(ops, parity=True, abstract=True, dtype="bfloat16")
           if cpu or any(n.startswith("mosaic") for n in backends(case))]
    first = {case.op.name: case for case in reversed(own)}
    for case in first.values():
        yield Job("parity", case)
    for case in cases(ops, abstract=True):
        if case.main and (backends(case) if cpu else _kernel_serves(case)):
            for direction in case.directions:
                yield Job(direction, case)
    for case in own:
        if first[case.op.name] is not case:
            yield Job("parity", case)


def _kernel_serves(case: Case) -> bool:
    # a workload for tensor cores may be too large for backends that are not kernels
    names = backends(case)
    return any(n.startswith("mosaic") for n in names) or bool(names and not case.hopper)


def run(job: Job, rounds: int, peak: float) -> list[dict[str, Any]]:
    """Do it, and return its rows as JSON holds them."""
    checked = job.what == "parity"
    (case,) = cases((job.case.op.name,), (job.case.spec,), parity=checked,
                    dtype="bfloat16" if checked else None)
    names = backends(case)
    if checked:
        rows: list[Any] = parity.check_case(case, "bfloat16", names)
        return [dataclasses.asdict(row) | {"failed": row.failed} for row in rows]
    if case.hopper:  # dense XLA paths may not fit
        names = [n for n in names if n != "xla"] or names
    rows = bench.bench_case(case, case.make(), job.what, names, rounds, peak)
    return [dataclasses.asdict(row) | {"failed": bool(row.error)} for row in rows]


def _key(job: Job, about: dict[str, Any], digests: dict[str, str]) -> str:
    folder = job.case.call.__module__.split(".")[1]
    parts = (job.name, job.case.shapes(), about["device"], about["versions"], digests[folder])
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:20]


def _alive() -> None:
    """End the process where a kernel has left the device unusable: the next one begins afresh."""
    try:
        jnp.ones(8).sum().block_until_ready()
    except Exception as e:
        supervised.end(f"{type(e).__name__}: {e}".splitlines()[0])


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("measure", __doc__, EXAMPLES)
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME",
                        help=f"all unless named: {', '.join(OPS)}")
    parser.add_argument("--seconds", type=float, default=540,
                        help="begin nothing new after so many (540)")
    parser.add_argument("--stall", type=float, default=120, metavar="SECONDS",
                        help="a workload that takes longer is given up (120)")
    parser.add_argument("--rounds", type=int, default=10, help="timed batches of each (10)")
    parser.add_argument("--keep", metavar="FILE", default=str(RECORD),
                        help="results, a line each (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true",
                        help="print a page of what is kept, and run nothing")
    parser.add_argument("--cpu", action="store_true", help="also where there is no accelerator")
    return parser


def _kept(path: Path) -> list[Result]:
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            found.append(Result(**json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"--keep {path}: line {number} is not a result") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds}: quartiles need at least 2")
    path = Path(asked.keep)
    try:
        kept = _kept(path)
        list(cases(tuple(asked.op), abstract=True))
    except (OSError, ValueError) as e:
        parser.error(str(e))
    if asked.markdown:
        print(page(kept))
        return 0
    if device.platform() == "cpu" and not asked.cpu:
        parser.error("there is no accelerator here; --cpu measures this machine's processor")
    deadline = float(os.environ.get(_DEADLINE, time.time() + asked.seconds))
    return _measure(asked, path, kept, deadline)


def _measure(asked: argparse.Namespace, path: Path, kept: list[Result], deadline: float) -> int:
    root = Path(__file__).parent
    own = sources(root)
    shared = own[""] + b"".join(own[n] for n in own if n.startswith("mosaic"))
    digests = {n: hashlib.sha256(shared + text).hexdigest() for n, text in own.items()}
    about: dict[str, Any] = {"device": device.target().kind, "versions": versions()}
    done = {r.key for r in kept if not r.failed}
    todo = [(job, key) for job in jobs(tuple(asked.op), cpu=asked.cpu)
            if (key := _key(job, about, digests)) not in done]
    peak = bench.ceiling(2048 if device.platform() == "cpu" else 8192) if todo else 0.0
    failed = False
    for n, (job, key) in enumerate(todo, 1):
        left = deadline - time.time()
        if left <= 0:
            print(f"{len(todo) - n + 1} of {len(todo)} are left: the same command goes on",
                  file=sys.stderr)
            return UNFINISHED
        start = time.perf_counter()
        ended = supervised.begin(job.name)
        if ended:
            rows = [{"op": job.case.op.name, "spec": job.case.spec, "error": ended, "failed": True}]
        else:
            try:
                rows = run(job, asked.rounds, peak)
            except Exception as e:  # of a reference or of making arrays: told as the row's
                rows = [{"op": job.case.op.name, "spec": job.case.spec, "failed": True,
                         "error": f"{type(e).__name__}: {e}".splitlines()[0]}]
        bad = any(row["failed"] for row in rows)
        failed = failed or bad
        if bad and not ended:
            _alive()
        result = Result(key, **about, date=time.strftime("%Y-%m-%d"), what=job.what, peak=peak,
                        rows=rows)
        with path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        print(f"{n}/{len(todo)} {job.name}: {'FAILED' if bad else 'done'} in "
              f"{time.perf_counter() - start:.1f} s, {max(left, 0):.0f} s left", file=sys.stderr,
              flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if supervised.log():
        raise SystemExit(main())
    _asked = _parser().parse_args()  # also --help and wrong arguments, without a child
    os.environ[_DEADLINE] = str(time.time() + _asked.seconds)
    raise SystemExit(supervised.supervise("kernels_pallas.measure", sys.argv[1:],
                                          stall=_asked.stall))
