"""What a sweep shows while it runs: a line per child that ends, and a table of those at work."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling.children import Child
from sparse_pretrain.training.progress import clock, figures

SHOWN = 16  # children at work, at most
STYLES = {"failed": "red", "interrupted": "yellow", "pruned": "cyan"}


def line(child: Child) -> str:
    """What a running child is doing, from its files."""
    run = workdir.read(child.workdir, rows=False)
    if not run.metrics:
        return "starting"
    row, steps = run.metrics[-1], run.derived.get("steps")
    step, tokens, pace = (row.get(k) for k in ("step", "tokens", "tokens_per_second"))
    text = f"{step}/{steps or '?'}  {figures(row)}"
    if steps and step and tokens and pace:
        text += f"  ETA {clock((steps - step) * tokens / step / pace)}"
    return text


class Display:
    """Prints lines; on a terminal, keeps a table of the children at work below them."""

    def __init__(self, console: Console):
        self.console = console
        self._live: Live | None = None
        self._began = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While this is open, the table is there."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def say(self, text: str, status: str = "") -> None:
        """A line that stays."""
        style = STYLES.get(status, "")
        self.console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    def starts(self, place: str, child: Child) -> None:
        """A child begins; where a table shows that, nothing is said."""
        if self._live is None:
            verb = "resuming" if workdir.is_workdir(child.workdir) else "running"
            self.say(f"{place} {child.label}  {verb}")

    def update(
        self,
        running: Mapping[str, tuple[str, Child, float]],
        counts: Mapping[str, int],
        total: int,
    ) -> None:
        """The table anew: (place, child, when it began) of those at work, and how many ended."""
        if self._live is None:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        table.add_column("run", overflow="fold")
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("progress", no_wrap=True)
        for place, child, began in list(running.values())[:SHOWN]:
            age = clock(time.monotonic() - began)
            table.add_row(*(Text(x) for x in (place, child.label, age, line(child))))
        parts = [f"{n} {status}" for status, n in counts.items() if n]
        done = sum(counts.values())
        text = f"{done}/{total} done" + (f": {', '.join(parts)}" if parts else "")
        if len(running) > SHOWN:
            text += f"; {len(running)} running"
        elif running:
            text += f"; {clock(time.monotonic() - self._began)} so far"
        self._live.update(Group(table, Text(text, style="bold")), refresh=True)
