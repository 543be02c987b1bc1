"""What this package's commands share: how workloads are asked for, and how a table is laid out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from kernels_pallas.cases import OPS, Case


def parser(name: str, about: str | None, examples: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m kernels_pallas.<name>`, with its examples at the end."""
    return argparse.ArgumentParser(
        prog=f"python -m kernels_pallas.{name}", description=about, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def add_workloads(to: argparse.ArgumentParser, *, specs: str, backends: str,
                  all_ops: bool = False) -> None:
    """Add --op, --spec and --backend; `specs` and `backends` say what is meant unless named."""
    known = ", ".join(OPS)
    to.add_argument("--op", nargs="+", default=[], metavar="NAME", required=not all_ops,
                    help=f"all unless named: {known}" if all_ops else f"of {known}")
    to.add_argument("--spec", nargs="+", default=[], metavar="NAME",
                    help=f"workloads in the ops' specs.py; those under {specs} unless named")
    to.add_argument("--backend", nargs="+", default=[], metavar="NAME",
                    help=f"{backends} unless named")


def check_backends(of: argparse.ArgumentParser, named: Iterable[str],
                   chosen: Iterable[Case]) -> None:
    """End the command with one line where a name is of no backend of the chosen cases."""
    known = {backend.name for case in chosen for backend in case.op.backends}
    for name in named:
        if name not in known:
            of.error(f"backend {name!r} is unknown; there are {', '.join(sorted(known))}")


def backends(case: Case, named: Sequence[str]) -> list[str]:
    """Return the case's backends that were named, and all but the reference where none was."""
    return [backend.name for backend in case.op.backends
            if backend.name in named or (not named and backend.name != "reference")]


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Return lines of cells under one another; what ends a line may be wider than its column."""
    last = [max((i for i, cell in enumerate(line) if cell), default=0) for line in cells]
    widths = [max((len(line[i]) for line, end in zip(cells, last, strict=True) if i < end),
                  default=0) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
                     .rstrip() for line in cells)
