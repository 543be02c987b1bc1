"""Time every backend of an op on this machine, side by side.

Backends take turns in every round, so that a clock that falls or a busy neighbour meets them all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import command, device, others
from kernels_pallas.cases import DIRECTIONS, Case, cases

EXAMPLES = """examples:
  python -m kernels_pallas.bench --op grouped_matmul
  python -m kernels_pallas.bench --op grouped_matmul --spec olmoe --direction forward --json

columns: median of the rounds and the quartiles around it; FLOP/s of useful work, which counts no
padding and no recomputation (gradient is forward and backward); how much that is of the largest
rate of a plain matmul timed in the same run; arguments and results per second; temp, memory beside
them. The reference is timed only when named: it may take as many times the work as there are
experts.

exit status: 0 when all that was asked ran, 1 when a backend failed, 2 for arguments."""

# A timed batch of calls lasts this long at least, so that dispatch and the clock do not count.
_BATCH_SECONDS = 0.01


@dataclasses.dataclass
class Row:
    """Timings of one backend. Units: seconds, FLOP/s, bytes."""

    op: str
    spec: str
    direction: str
    backend: str
    median: float | None = None
    low: float | None = None  # quartiles
    high: float | None = None
    flops_per_second: float | None = None
    of_ceiling: float | None = None
    bytes_per_second: float | None = None
    temp_bytes: int | None = None
    rounds: int = 0
    refused: str | None = None
    error: str | None = None


def timed(call: Callable[[], Any], times: int) -> float:
    """Return the seconds of a call, on average over so many."""
    start = time.perf_counter()
    out = None
    for _ in range(times):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times


def batch(call: Callable[[], Any]) -> int:
    """Return how many calls last a batch; warms up."""
    jax.block_until_ready(call())
    once = timed(call, 1)
    return max(1, min(1000, int(_BATCH_SECONDS / max(once, 1e-7)) + 1))


def ceiling(size: int) -> float:
    """Return the best FLOP/s of size^3 bfloat16 matmuls on this device, of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    times = batch(lambda: product(a, b))
    return 2 * size**3 / min(timed(lambda: product(a, b), times) for _ in range(5))


def prepare(case: Case, direction: str, row: Row, arguments, arrays, options, tune=False):
    """Compile one backend: a call without arguments, and the bytes it takes and gives.

    With `tune` Tokamax searches its block sizes first.
    """
    cotangent = None
    if direction == "gradient":
        out = jax.eval_shape(case.function("forward", options, row.backend), arguments, arrays,
                             None)
        key = jax.random.key(0)  # zeros and ones would draw less power
        cotangent = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), out)

    def function():  # a new one, so that it is traced anew
        return jax.jit(case.function(direction, options, row.backend), keep_unused=True)

    call = (arguments, arrays, cotangent)
    with others.tuned(function(), call) if tune else contextlib.nullcontext():
        compiled = function().lower(*call).compile()
    memory: Any = compiled.memory_analysis()
    row.temp_bytes = int(memory.temp_size_in_bytes)
    moved = int(memory.argument_size_in_bytes + memory.output_size_in_bytes)
    return (lambda: compiled(*call)), moved


def bench_case(case: Case, made: tuple[Any, Any], direction: str, names: Sequence[str],
               rounds: int, peak: float, tune: bool = False) -> list[Row]:
    """Time these backends on one direction of one workload, taking turns.

    `made` is what the case makes, `peak` in FLOP/s; with `tune` Tokamax searches first. A backend
    that refuses has its reason in its row, one that breaks its error.
    """
    arguments, keywords = made
    arrays = {k: x for k, x in keywords.items() if isinstance(x, jax.Array)}
    options = {k: x for k, x in keywords.items() if k not in arrays}
    refusals = case.op.explain(*arguments, **keywords)
    rows: list[Row] = []
    running: list[tuple[Row, Callable[[], Any], int, int, list[float]]] = []
    for name in names:
        row = Row(case.op.name, case.spec, direction, name, refused=refusals[name])
        rows.append(row)
        if row.refused is not None:
            continue
        try:
            call, moved = prepare(case, direction, row, arguments, arrays, options,
                                  tune and name == "tokamax")
            running.append((row, call, moved, batch(call), []))
        except Exception as e:  # of any backend: the others' times are still wanted
            row.error = f"{type(e).__name__}: {e}".splitlines()[0]
    for _ in range(rounds):
        for _, call, _, times, found in running:
            found.append(timed(call, times))
    for row, _, moved, _, found in running:
        row.low, row.median, row.high = statistics.quantiles(found, n=4, method="inclusive")
        row.rounds = rounds
        row.flops_per_second = case.flops(direction) / row.median
        row.of_ceiling = row.flops_per_second / peak
        row.bytes_per_second = moved / row.median
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    names = ("op", "spec", "direction", "backend", "ms", "low", "high", "TFLOP/s", "of matmul",
             "GB/s", "temp MB")
    cells: list[tuple[str, ...]] = [names]
    for r in rows:
        head = (r.op, r.spec, r.direction, r.backend)
        if r.median is None or r.low is None or r.high is None:
            why = f"FAILED {r.error}" if r.error else f"refused: {r.refused}"
            cells.append((*head, why, *[""] * 6))
            continue
        assert r.flops_per_second is not None
        assert r.of_ceiling is not None
        assert r.bytes_per_second is not None
        cells.append((*head, *(f"{1e3 * t:.4g}" for t in (r.median, r.low, r.high)),
                      f"{r.flops_per_second / 1e12:.4g}", f"{r.of_ceiling:.0%}",
                      f"{r.bytes_per_second / 1e9:.4g}", f"{(r.temp_bytes or 0) / 1e6:.4g}"))
    return command.columns(cells)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("bench", __doc__, EXAMPLES)
    command.add_workloads(parser, specs="SPEED", backends="all but the reference")
    parser.add_argument("--direction", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS,
                        help="both unless named")
    parser.add_argument("--rounds", type=int, default=20, help="timed batches of each (20)")
    parser.add_argument("--matmul", type=int, metavar="SIZE",
                        help="side of the matmul that rates are held against (8192, on CPU 2048)")
    parser.add_argument("--tune-tokamax", action="store_true",
                        help="let Tokamax search its block sizes first, which takes minutes a "
                             "workload; ours are searched by kernels_pallas.tune")
    parser.add_argument("--json", action="store_true", help="print JSON and not a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds}: quartiles need at least 2")
    try:
        chosen = list(cases(tuple(asked.op), tuple(asked.spec), speed=not asked.spec))
    except ValueError as e:
        parser.error(str(e))
    command.check_backends(parser, asked.backend, chosen)
    peak = ceiling(asked.matmul or (2048 if device.platform() == "cpu" else 8192))
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__,
             "matmul_flops_per_second": peak}
    rows: list[Row] = []
    for case in chosen:
        names = command.backends(case, asked.backend)
        made = case.make()
        for direction in case.directions:
            if direction in asked.direction:
                rows += bench_case(case, made, direction, names, asked.rounds, peak,
                                   asked.tune_tokamax)
                print(f"{case.op.name} {case.spec} {direction} done", file=sys.stderr, flush=True)
    if asked.json:
        print(json.dumps(about | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        print(f"{about['device']}, jax {about['jax']}, matmul {peak / 1e12:.4g} TFLOP/s")
        print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
