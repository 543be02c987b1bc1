"""The live line of a run: a bar on a terminal, a plain line every few seconds anywhere else."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

WIDE = 160  # characters of a line where nothing says how many there are
_SI = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def console() -> Console:
    """Standard output; a file or a pipe has no width to fold a table's columns to."""
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


def si(value: float | None, digits: int = 3) -> str:
    """1234567 as '1.23M'; absent or non-finite as '-'."""
    if value is None or not math.isfinite(value):
        return "-"
    for size, letter in _SI:
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def clock(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss; unknown as '-:--'."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def figures(row: Mapping[str, Any]) -> str:
    """The numbers of a metrics row that the line shows; what the row lacks is left out."""
    parts = [f"phase {row['phase']}"] if "phase" in row else []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}" if _finite(row["loss"]) else "loss not finite")
    if _finite(row.get("bits_per_byte")):
        parts.append(f"{row['bits_per_byte']:.3f} bits/byte")
    if _finite(row.get("tokens_per_second")):
        parts.append(f"{si(row['tokens_per_second'])} tok/s")
    if _finite(row.get("mfu")):
        parts.append(f"MFU {100 * row['mfu']:.1f}%")
    return "  ".join(parts)


class Bar:
    """Step of total, loss, bits/byte, tokens/s, MFU and ETA, from `start` to `total` steps.

    Units: `seconds` between plain lines when the console is not a terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        seconds: float = 5.0,
        console: Console | None = None,
    ):
        self._console = console or Console()
        self._total, self._start, self._step = total, start, start
        self._seconds, self._said = seconds, -math.inf
        self._marks: list[tuple[float, int]] = []
        self._text = ""
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=total, completed=start, text="")

    def __enter__(self) -> "Bar":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._progress:
            self._progress.stop()
        elif self._text and self._last_said != self._step:
            self._say(time.monotonic())

    _last_said: int | None = None

    def eta(self) -> float | None:
        """Seconds left at the pace of the last minute or so; None before the second update."""
        if len(self._marks) < 2:
            return None
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        return (t1 - t0) / (s1 - s0) * (self._total - s1) if s1 > s0 else None

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Show `step` with the numbers of its metrics row."""
        now = time.monotonic()
        self._step = step
        # The first update pays for compilation, so pace is measured between updates only.
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[0][0] > 60:
            self._marks.pop(0)
        self._text = f"{figures(row)}  ETA {clock(self.eta())}"
        if self._progress:
            self._progress.update(self._task, completed=step, text=self._text)
        elif now - self._said >= self._seconds or step >= self._total:
            self._say(now)

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say(self, now: float) -> None:
        self._said, self._last_said = now, self._step
        self.note(f"{self._step}/{self._total}  {self._text}")


@contextlib.contextmanager
def status(text: str, console: Console | None = None) -> Iterator[None]:
    """A spinner with `text` and the seconds it took; one plain line where there is no terminal.

    Writes to standard error by default, so that `--json` output stays clean.
    """
    console = console or Console(stderr=True)
    began = time.monotonic()
    if not console.is_terminal:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text)
        yield
    took = clock(time.monotonic() - began)
    console.print(f"{text} {took}", markup=False, highlight=False, soft_wrap=True)
