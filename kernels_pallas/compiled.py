"""What became of compilations: a row each, kept in a file to go on from, and shown as tables."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels_pallas.cases import Case
from kernels_pallas.chips import Chip
from kernels_pallas.command import columns

# Files beside the ops' folders that change no program of a given backend: commands, what describes
# calls, the choice among backends, and what names or joins ops.
_APART = ("__init__", "bench", "cases", "command", "compile", "compiled", "joined", "measure", "op",
          "parity", "program", "results", "supervised", "tune")
# Files that only one backend's kernels are made of.
_SHARED = dict.fromkeys(("blackwell", "blackwell_attention", "blackwell_scores", "generation",
                         "halves", "hopper", "products"), "mosaic_gpu")
_SHARED |= {"tpu": "mosaic_tpu", "others": "tokamax"}
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu",
             "nvidia-cuda-nvcc")


@dataclasses.dataclass
class Row:
    """What became of one compilation. Units: seconds, bytes, FLOPs."""

    target: str
    op: str
    spec: str
    direction: str
    backend: str | None = None
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # by the backends before it
    seconds: float | None = None
    temp_bytes: int | None = None
    kernels: int = 0
    registers: int | None = None
    shared_bytes: int | None = None
    spilled_bytes: int | None = None
    serialized: bool = False  # the assembler could not let products run on while code goes on
    flops: float = 0.0
    io_bytes: int | None = None
    roofline_seconds: float | None = None
    declared: str | None = None
    error: str | None = None
    program: str | None = None  # digest of what the compiler was given
    same_as: str | None = None  # the row this program was compiled for
    earlier: str | None = None  # of which other source it is, None for today's

    @property
    def name(self) -> str:
        """Return the workload, direction and backend, which a chip has one row of."""
        return f"{self.op} {self.spec} {self.direction} {self.backend}"

    @property
    def failed(self) -> bool:
        """Return whether this fails the command."""
        return self.error is not None or bool(self.spilled_bytes) or self.serialized

    @property
    def state(self) -> str:
        """Return 'failed', 'refused' or 'compiled'."""
        return "failed" if self.failed else "refused" if self.seconds is None else "compiled"

    @property
    def troubles(self) -> list[str]:
        """Return a line for each thing that is to be told below a table."""
        where = f"{self.target} {self.op} {self.spec} {self.direction}"
        lines = []
        if self.error:
            lines.append(f"FAILED {where}: {self.error.splitlines()[0]}")
        elif self.seconds is None:
            reason = self.declared or "; ".join(f"{k}: {v}" for k, v in self.refused.items())
            lines.append(f"refused {where}: {reason}")
        if self.spilled_bytes:
            lines.append(f"FAILED {where}: {self.spilled_bytes} bytes spilled")
        if self.serialized:
            lines.append(f"FAILED {where}: asynchronous products are serialized")
        return lines


def versions() -> dict[str, str]:
    """Return the versions of what compiles, by package, where installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources(root: Path) -> dict[str, bytes]:
    """Return the files a program may come from, by folder; '' is what all ops share, and the name
    of a backend what its kernels share."""
    texts: dict[str, bytes] = collections.defaultdict(bytes)
    for path in sorted(root.rglob("*.py")):
        folder = path.parent.relative_to(root).as_posix()
        if path.stem == "specs" or (folder == "." and path.stem in _APART):
            continue  # shapes are asked of the case itself
        if folder == ".":
            folder = _SHARED.get(path.stem, "")
        texts[folder] += path.name.encode() + path.read_bytes()
    # what an op takes from another's folder
    return texts | {folder: text + b"".join(
        other for name, other in texts.items()
        if name not in ("", folder, *_SHARED.values())
        and f"kernels_pallas.{name}".encode() in text)
        for folder, text in texts.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Kept:
    """Rows in a file, one JSON object a line: what a command that was stopped goes on from.

    A row is found again only for the same chip, shapes, versions and source files of its op. Fields
    at their default are left out, and versions are a line of their own that rows name.
    Several commands may write to one file.
    Errors: ValueError for a file that holds something else, OSError for one that cannot be used.
    """

    def __init__(self, path: str | None) -> None:
        self._file = Path(path) if path else None
        self._rows: dict[str, Row] = {}
        self._programs: dict[str, Row] = {}
        self._latest: dict[tuple[Any, ...], Row] = {}
        root = Path(__file__).parent
        files = sources(root)
        self._digests = {folder: hashlib.sha256(files[""] + text).hexdigest()
                         for folder, text in files.items()}
        self._versions = versions()
        self._by = _digest(json.dumps(self._versions))[:8]
        known = set()
        if self._file is not None:
            self._file.touch()
            for number, line in enumerate(self._file.read_text().splitlines(), 1):
                try:
                    entry = json.loads(line)
                    if "versions" in entry:
                        known.add(entry["by"])
                    else:
                        self._remember(entry["key"], Row(**entry["row"]), entry["by"])
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"--keep {path}: line {number} is not a row") from None
        if self._file is not None and self._by not in known:
            self._write({"by": self._by, "versions": self._versions})

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def key(self, case: Case, direction: str, chip: Chip, backend: str | None) -> str:
        """Return what tells this compilation from any other."""
        if self._file is None:
            return ""
        folder = case.call.__module__.split(".")[1]
        arguments: Any = case.shapes()
        parts = (chip, case.op.name, case.spec, direction, backend, arguments,
                 json.dumps(self._versions), self._digests.get(folder),
                 self._digests[backend or ""] if backend in _SHARED.values() else "")
        return _digest("\n".join(map(repr, parts)))

    def get(self, key: str, *, failed: bool = False) -> Row | None:
        """Return the row kept under a key, or None. One that failed is tried again, unless asked
        for."""
        row = self._rows.get(key)
        return None if row is None or (row.failed and not failed) else row

    def before(self, case: Case, direction: str, chip: Chip, backend: str | None) -> Row | None:
        """Return the last row of these versions whatever source it was of, marked as such."""
        row = self._latest.get((chip.name, case.op.name, case.spec, direction, backend))
        return row and dataclasses.replace(row, earlier=row.earlier or "earlier source")

    def same(self, row: Row) -> Row | None:
        """Return the row that this one's program gives, of the program as it was compiled before.

        Its own row of an earlier source comes back as it was; another's with the seconds at 0.
        """
        found = self._programs.get(row.program or "")
        if found is None:
            return None
        own = {n: getattr(row, n) for n in ("spec", "direction", "op", "refused", "flops")}
        if found.name == row.name:
            return dataclasses.replace(found, **own)
        assert found.target == row.target, f"{found.target} is not {row.target}"
        return dataclasses.replace(found, **own, backend=row.backend, seconds=0.0,
                                   same_as=found.name)

    def _remember(self, key: str, row: Row, by: str) -> None:
        if key:
            self._rows[key] = row
        if by == self._by:
            self._latest[row.target, row.op, row.spec, row.direction, row.backend] = row
            if row.program and not row.failed and not row.same_as:
                self._programs.setdefault(row.program, row)

    def add(self, key: str, row: Row) -> None:
        """Keep a row at once, so that it is there when this process ends."""
        self._remember(key, row, self._by)
        if self._file is not None:
            told = {f.name: value for f in dataclasses.fields(row)
                    if (value := getattr(row, f.name)) not in (f.default, {})}
            self._write({"key": key, "by": self._by, "row": told})


def merge(into: str, *others: str) -> int:
    """Leave in a file the last row of every program, of it and then of the others; return how many.

    Errors: ValueError for a file that holds something else, OSError for one that cannot be used.
    """
    named: dict[str, str] = {}
    rows: dict[tuple[Any, ...], str] = {}
    for path in (into, *others):
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            try:
                entry = json.loads(line)
                if "versions" in entry:
                    named[entry["by"]] = line
                    continue
                row = Row(**entry["row"])
                which = (entry["by"], row.target, row.op, row.spec, row.direction, row.backend)
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}: line {number} is not a row") from None
            rows.pop(which, None)
            rows[which] = line
    lines = [line for by, head in named.items()
             for line in (head, *(line for which, line in rows.items() if which[0] == by))]
    whole = Path(f"{into}.new")
    whole.write_text("".join(f"{line}\n" for line in lines))
    whole.replace(into)
    return len(rows)


def amount(n: float | None, unit: str = "") -> str:
    """A number with three digits and a prefix."""
    if n is None:
        return "-"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3)):
        if n >= size:
            return f"{n / size:.3g} {prefix}{unit}".rstrip()
    return f"{n / 1e-6:.3g} u{unit}" if n else f"0 {unit}".rstrip()


NAMES = ("target", "op", "spec", "direction", "backend", "seconds", "temp", "kernels",
         "registers", "shared", "spilled", "roofline", "FLOPs")


def _cells(row: Row) -> tuple[str, ...]:
    kernel = ["-" if n is None else str(n) for n in
              (row.kernels or None, row.registers, row.shared_bytes, row.spilled_bytes)]
    state = ("FAILED" if row.error else "refused" if row.seconds is None else
             f"as {row.same_as}" if row.same_as else "")
    state = state or f"{row.seconds:.2f}"
    return (row.target, row.op, row.spec, row.direction, row.backend or "-",
            f"{state} ({row.earlier})" if row.earlier else state, amount(row.temp_bytes, "B"),
            *kernel, amount(row.roofline_seconds, "s"), amount(row.flops))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, with what was refused or failed below."""
    cells = [NAMES, *map(_cells, rows)]
    return "\n".join([columns(cells), *(line for row in rows for line in row.troubles)])


def _grid(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *lines)]


def markdown(rows: Sequence[Row], asked: int | None = None) -> str:
    """Return a page: versions, how many programs became what, and each one that holds a kernel.

    Programs of the XLA backends are counted, and told one by one only where they did not compile.
    `asked` is how many there would be, if these are not all.
    """
    lines = ["# Compiled ahead of time", "",
             "Written by `python -m kernels_pallas.compile --markdown`, on a machine with none of "
             "the chips, with " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".", ""]
    if asked is not None and asked > len(rows):
        lines += [f"{len(rows)} of {asked} programs; the others were not tried.", ""]
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for row in rows:
        count = counts.setdefault((row.target, row.backend or "none"), collections.Counter())
        count.update([row.state, "same" if row.same_as else "", "earlier" if row.earlier else ""])
        count["seconds"] += round(row.seconds or 0)
        count["spilled"] += row.spilled_bytes or 0
    heads = {"compiled": "compiled", "same": "of them as another",
               "earlier": "of an earlier source", "refused": "refused",
               "failed": "failed", "spilled": "spilled bytes", "seconds": "seconds of compilation"}
    lines += _grid(("target", "backend", *heads.values()),
                   [(*key, *(str(c[n]) for n in heads)) for key, c in counts.items()])
    troubles = [line for row in rows for line in row.troubles]
    if troubles:
        lines += ["", "## Not compiled", "", *(f"- {line}" for line in troubles)]
    held = [_cells(row) for row in rows if row.kernels]
    lines += ["", "## Programs with kernels", "",
              "temp: bytes beside arguments and results; registers: the most of a thread at entry; "
              "shared: the most bytes of a block; roofline: the time no call can beat; 'as ...' in "
              "place of seconds: the compiler was given the same program for another row.", "",
              *_grid(NAMES, held)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Merge files that `kernels_pallas.compile --keep` wrote."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.compiled",
        description="Merge files of rows that `kernels_pallas.compile --keep FILE` wrote: the last "
                    "row of every program, in the order of the files, stays in the first.",
        epilog="example: "
               "python -m kernels_pallas.compiled kernels_pallas/compiled.jsonl b200.jsonl")
    parser.add_argument("into", metavar="FILE", help="the file that is written")
    parser.add_argument("others", metavar="FILE", nargs="*", help="files whose rows are added")
    options = parser.parse_args(argv)
    try:
        print(f"{options.into}: {merge(options.into, *options.others)} programs")
    except (OSError, ValueError) as e:
        parser.error(str(e))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
