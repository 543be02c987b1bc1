"""Compile every op, workload and direction for chips that this machine does not have.

Needs no accelerator and no driver, but the chips' compilers, best in an environment of their own:
`pip install 'sparse-pretrain[compile]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from kernels_pallas import device, program, supervised
from kernels_pallas.cases import OPS, Case, cases
from kernels_pallas.chips import CHIPS, EXTRA, Chip
from kernels_pallas.compiled import Kept, Row, markdown, table

EXAMPLES = """examples:
  python -m kernels_pallas.compile --target h200 --op grouped_matmul --backend mosaic_gpu
  python -m kernels_pallas.compile --target h100 v5p --op flash --spec mla_256 long_4k
  python -m kernels_pallas.compile --target all --json > compiled.json
  python -m kernels_pallas.compile --kept-only --markdown > kernels_pallas/COMPILED.md

Going through all takes hours; a run that was stopped is started again and goes on. Every row is
kept as it is done: in a checkout in kernels_pallas/compiled.jsonl, which belongs to the repository,
elsewhere in the file that --keep names. What is kept of the same source, shapes and versions is not
compiled again, but what failed is. Compilers run in a child process: where one aborts, that row has
failed and the others go on. Runs beside each other, of different chips, may share a file.

Each distinct program is compiled once: it is lowered first, and where the compiler of the same
chip was given the same text before, by another spec or before a change of the source that changes
nothing in it but the lines it is written on, its row says of which row it is a copy. Sister chips
share nothing: an H100 and an H200 are given the same text, but XLA fuses it by their bandwidths.

What training runs comes first, on every chip, and of that the programs with kernels; then
the small awkward workloads, on one chip of each family first.

columns: seconds to compile; temp, what a call takes beside arguments and results; how many Mosaic
kernels are in it, and on a GPU the most registers of a thread at entry and shared memory of a block
among them, and the bytes they spill together; roofline, the time no call can beat: the larger of
useful FLOPs over the chip's bfloat16 peak and arguments and results over its bandwidth.

exit status: 0 when all compiled, 1 when something did not that was not declared, or a kernel
spills or has its asynchronous products serialized, 2 for arguments or packages."""

# Rows that belong to the repository, in a checkout of it.
RECORD = Path(__file__).with_name("compiled.jsonl")
# One chip of each family: its sisters' compilers differ in numbers.
FIRST = ("h100", "b200", "v5p")

# (op, spec or None for all, direction or None for both, platform): why a compiler cannot be asked.
DECLARED: dict[tuple[str, str | None, str | None, str], str] = {}


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Keep what the process writes, compilers' own threads included; yields how to read it."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = supervised.log()
    with open(log, "w+b") if log else tempfile.TemporaryFile() as file:
        kept = [os.dup(fd) for fd in (1, 2)]

        def read() -> str:
            sys.stdout.flush()
            sys.stderr.flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield read
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, old in zip((1, 2), kept, strict=True):
                os.dup2(old, fd)
                os.close(old)


# What the assembler said of kernels, (registers, shared memory, spilled) each, by the GPU's
# capability, op, spec, direction and backend: a kernel met again, in a gradient or for a sister
# chip, is not assembled again.
_Report = list[tuple[int, int, int]]
_assembled: dict[tuple[Any, ...], _Report] = {}


def _assembler_report(text: str) -> _Report:
    """Read what Mosaic GPU and ptxas say: in the order of assembly, though in two streams."""
    shared = [int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spilled = [int(a) + int(b) for a, b in
               re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)]
    shared = shared[len(shared) - len(registers):] or [0] * len(registers)
    return list(zip(registers, shared, spilled, strict=True))


def _fill_in(row: Row, report: _Report, capability: tuple[int, int] | None) -> None:
    """Give the row of a GPU its kernels' resources."""
    if capability is None:
        return
    key = (capability, row.op, row.spec, row.direction, row.backend)
    if not report:
        report = _assembled.get(key, [])
    elif len(report) < row.kernels:
        report = report + _assembled.get((*key[:3], "forward", row.backend), [])
    if row.kernels and report:
        _assembled[key] = report
        row.registers = max(registers for registers, _, _ in report)
        row.shared_bytes = max(shared for _, shared, _ in report)
        row.spilled_bytes = sum(spilled for _, _, spilled in report)


def _with_roofline(row: Row, chip: Chip) -> Row:
    assert row.io_bytes is not None
    row.roofline_seconds = max(row.flops / chip.peak, row.io_bytes / chip.bandwidth)
    return row


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_case(case: Case, direction: str, chip: Chip, sharding: Any,
                 backend: str | None = None, kept: Kept | None = None) -> Row:
    """Compile one direction of one workload for one chip and say what became of it.

    `backend` None takes the one that `explain` would. Its refusals are in the row; what fails
    after it was chosen is the row's error. A program that `kept` has a row of is not compiled.
    """
    row = Row(chip.name, case.op.name, case.spec, direction, flops=case.flops(direction))
    for spec in (case.spec, None):
        for part in (direction, None):
            key = (case.op.name, spec, part, chip.target.platform)
            row.declared = row.declared or DECLARED.get(key)
    with device.assume(chip.target), _captured() as output:
        try:
            arguments, keywords = case.shapes()
            for name, reason in case.op.explain(*arguments, **keywords).items():
                if reason is None and backend in (None, name):
                    row.backend = name
                    break
                if reason is not None and backend in (None, name):
                    row.refused[name] = reason
            if row.backend is None or row.declared:
                return row
            arrays = {k: x for k, x in keywords.items() if isinstance(x, jax.ShapeDtypeStruct)}
            options = {k: x for k, x in keywords.items() if k not in arrays}
            cotangent = None
            if direction == "gradient":
                forward = case.function("forward", options, row.backend)
                cotangent = jax.eval_shape(forward, arguments, arrays, None)
            function = case.function(direction, options, row.backend)
            start = time.perf_counter()
            lowered = jax.jit(function, keep_unused=True).lower(
                *_placed((arguments, arrays, cotangent), sharding))
            given = jax.tree.leaves((arguments, arrays, cotangent, lowered.out_info))
            taken = sum(x.size * x.dtype.itemsize for x in given)
            if taken > chip.memory:
                row.declared = (f"arguments and results take {taken / 1e9:.1f} GB, the chip has "
                                f"{chip.memory / 1e9:.1f}")
                return row
            # The chip with all that its compiler is told of it, and the program: the same text for
            # the same chip is the same result.
            text = f"{chip}\n{program.digest(lowered)}"
            row.program = hashlib.sha256(text.encode()).hexdigest()[:20]
            same = kept and kept.same(row)
            if same:
                return _with_roofline(same, chip)
            compiled = lowered.compile()
            row.seconds = time.perf_counter() - start
            memory: Any = compiled.memory_analysis()
            made = compiled.as_text() or ""
            row.kernels = sum(made.count(f'custom_call_target="{name}')
                              for name in ("mosaic_gpu", "tpu_custom_call"))
        except Exception as e:  # of any compiler: this command is here to report them
            row.error = f"{type(e).__name__}: {e}".strip()
            return row
        finally:
            said = output()
            if row.seconds is not None or row.error:
                _fill_in(row, _assembler_report(said), chip.target.capability)
            row.serialized = "wgmma.mma_async instructions are serialized" in said  # ptxas
    row.temp_bytes = int(memory.temp_size_in_bytes)
    row.io_bytes = int(memory.argument_size_in_bytes + memory.output_size_in_bytes)
    return _with_roofline(row, chip)


def backends_for(case: Case, chip: Chip, *, named: bool = False) -> Sequence[str | None]:
    """Return the backends this chip would run, but the reference; [None] where there is none.

    A workload for tensor cores is compiled by kernels of ours alone, and what is made to be awkward
    for Hopper's by those, unless its spec is `named`.
    """
    with device.assume(chip.target):
        arguments, keywords = case.shapes()
        verdicts = case.op.explain(*arguments, **keywords)
    names = [n for n, reason in verdicts.items() if reason is None and n != "reference"]
    if case.hopper and not named:
        ours = ("mosaic_gpu", "mosaic_tpu") if case.main else ("mosaic_gpu",)
        return [n for n in names if n in ours]
    return names or [None]


@functools.cache
def _one(chip: Chip) -> Any:
    """Return the sharding of what is on one device of a chip."""
    with _captured():  # compilers speak of the accelerators they look for
        devices = chip.devices()
    mesh = jax.sharding.Mesh(devices[:1], ("one",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _turn(chip: Chip, case: Case, backend: str | None) -> tuple[bool, bool, bool]:
    """Order compilations: what training runs first, and of that what has kernels of ours; small
    workloads on one chip of a family before its sisters."""
    return (not case.main, not case.main and chip.name not in FIRST, backend in (None, "xla"))


def compile_for(chip: Chip, jobs: Sequence[tuple[Case, str | None]], kept: Kept, *,
                known_only: bool = False) -> Iterator[tuple[Row, bool]]:
    """Compile these cases with these backends for a chip, one row for each direction.

    With each row whether it was compiled now. `known_only` takes what `kept` holds, if need be of
    an earlier source, and skips the rest.
    """
    for case, backend in jobs:
        for direction in case.directions:
            key = kept.key(case, direction, chip, backend)
            row = kept.get(key, failed=known_only)
            new = row is None and not known_only
            if new:
                what = f"{chip.name} {case.op.name} {case.spec} {direction} {backend}"
                if ended := supervised.begin(what):
                    row = Row(chip.name, case.op.name, case.spec, direction, backend,
                              error=ended, flops=case.flops(direction))
                else:
                    row = compile_case(case, direction, chip, _one(chip), backend, kept)
                kept.add(key, row)
                jax.clear_caches()  # what was traced and compiled is not needed again
            elif row is None:
                row = kept.before(case, direction, chip, backend)
            if row is not None:
                yield row, new


class _Progress:
    """What is done and about how long the rest will take: a bar on a terminal, lines elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.new = total, 0, 0
        self.start = time.monotonic()
        self.bar = sys.stderr.isatty()

    def __call__(self, row: Row, new: bool) -> None:
        """Tell one more row; what was kept is told on terminals only."""
        self.done, self.new = self.done + 1, self.new + new
        left = ""
        if self.new and self.done < self.total:
            each = (time.monotonic() - self.start) / self.new
            left = f", {_duration(each * (self.total - self.done))} left at most"
        name = f"{row.target} {row.op} {row.spec} {row.direction} {row.backend or ''}".rstrip()
        counted = f"{self.done}/{self.total}"
        if self.bar:
            full = round(20 * self.done / self.total)
            line = f"{'#' * full}{'.' * (20 - full)} {counted}{left}: {name}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
            if row.failed or self.done == self.total:
                print(f"\r{name}: {row.state}"[:width].ljust(width), file=sys.stderr)
        elif new:
            print(f"{counted}{left} {name}: {row.state}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.compile", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["all"], metavar="CHIP",
                        choices=[*CHIPS, "all"], help=f"all (default), {', '.join(CHIPS)}")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME",
                        help=f"all unless named: {', '.join(OPS)}")
    parser.add_argument("--spec", nargs="+", default=[], metavar="NAME",
                        help="workloads in each op's specs.py, all unless named")
    parser.add_argument("--main", action="store_true",
                        help="only what training runs, without the small awkward workloads")
    parser.add_argument("--backend", metavar="NAME",
                        help="this backend only, where it can; all that the chip runs unless named")
    parser.add_argument("--keep", metavar="FILE", default=str(RECORD) if RECORD.exists() else None,
                        help="keep every row here as it is done, and do not compile again what is "
                             "here from before (default: %(default)s; '' keeps nothing)")
    parser.add_argument("--kept-only", action="store_true",
                        help="compile nothing: print what is kept of what is asked, also of an "
                             "earlier source, and say so")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON and not a table")
    form.add_argument("--markdown", action="store_true", help="print a page and not a table")
    return parser


def _chips(options: argparse.Namespace) -> list[Chip]:
    return [chip for name, chip in CHIPS.items() if {name, "all"} & set(options.target)]


def command(argv: Sequence[str]) -> int:
    """Run the command in child processes, one for each family of chips after another.

    Mosaic GPU compiles for the architecture that a process compiled for first, and takes a kernel
    that it has compiled before whatever it was for.
    """
    module, options = "kernels_pallas.compile", _parser().parse_args(argv)
    families: dict[Any, list[str]] = {}
    for chip in _chips(options):
        family = (chip.target.platform, chip.target.capability)
        families.setdefault(family, []).append(chip.name)
    if options.kept_only or len(families) == 1:
        return supervised.supervise(module, argv)
    with tempfile.TemporaryDirectory() as folder:
        keep = options.keep or f"{folder}/kept.jsonl"
        for part in [["--main"]] if options.main else [["--main"], []]:
            for names in families.values():
                status = supervised.supervise(
                    module, [*argv, "--target", *names, "--keep", keep, *part], quiet=True)
                if status not in (0, 1):
                    return status
        return supervised.supervise(module, [*argv, "--keep", keep, "--kept-only"])


def main(argv: Sequence[str] | None = None) -> int:
    """Compile in this process and return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        chosen = [case for case in cases(tuple(options.op), tuple(options.spec), abstract=True)
                  if case.main or not options.main]
    except ValueError as e:
        parser.error(str(e))
    names = {b.name for case in chosen for b in case.op.backends}
    if options.backend is not None and options.backend not in names:
        parser.error(f"backend {options.backend!r} is unknown; there are "
                     f"{', '.join(sorted(names))}")
    chips = _chips(options)
    lacking = sorted({package for chip in chips if (package := chip.missing())})
    if lacking:
        print(f"kernels_pallas.compile: {' and '.join(lacking)} not installed; "
              f"pip install 'sparse-pretrain[{EXTRA}]'", file=sys.stderr)
        return 2
    if options.kept_only and not options.keep:
        parser.error("--kept-only needs --keep FILE")
    try:
        kept = Kept(options.keep)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    # The assembler's report is printed where these are set.
    os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1")
    # libtpu takes a lock as if it used a chip; several of these commands may run beside each other.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")  # the plugins look for devices otherwise
    named = bool(options.spec)
    jobs = [(chip, case, name) for chip in chips for case in chosen for name in
            ([options.backend] if options.backend else backends_for(case, chip, named=named))]
    total = sum(len(case.directions) for _, case, _ in jobs)
    done: dict[int, list[Row]] = {}
    tell = _Progress(total)
    for n in sorted(range(len(jobs)), key=lambda n: _turn(*jobs[n])):  # in order where they tie
        chip, case, name = jobs[n]
        done[n] = []
        for row, new in compile_for(chip, [(case, name)], kept, known_only=options.kept_only):
            done[n].append(row)
            tell(row, new)
    rows = [row for n in sorted(done) for row in done[n]]
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(markdown(rows, total) if options.markdown else table(rows))
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main() if supervised.log() else command(sys.argv[1:]))
