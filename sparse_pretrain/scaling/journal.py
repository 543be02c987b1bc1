"""What happened in a sweep, one line an event, so that a driver that was killed is no loss.

What a child reached is in its workdir and nowhere else; the journal keeps what no workdir says:
attempts, why they ended, which were pruned, and the jobs that a scheduler still has.
"""

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from sparse_pretrain.training.metrics import read_rows

FILE = "journal.jsonl"


class Journal:
    """Appends events to `root/journal.jsonl`, each whole or not at all for who reads it."""

    def __init__(self, root: Path):
        self.path = root / FILE
        self.events = read_rows(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        torn = self.path.stat().st_size and self.path.read_bytes()[-1:] != b"\n"
        if torn:  # a driver was killed in the middle of a line
            os.write(self._file, b"\n")

    def write(self, event: str, **fields: Any) -> None:
        """One event, on disk when this returns."""
        row = {"time": round(time.time(), 3), "event": event, **fields}
        self.events.append(row)
        os.write(self._file, (json.dumps(row, default=str) + "\n").encode())

    def close(self) -> None:
        """No more events."""
        os.close(self._file)

    def attempts(self) -> dict[str, int]:
        """How often each child was started."""
        count: dict[str, int] = defaultdict(int)
        for row in self.events:
            count[row.get("id", "")] += row["event"] == "start"
        return dict(count)

    def causes(self) -> dict[str, list[str]]:
        """Why attempts of each child did not finish, oldest first.

        One that has no end in the journal was cut off with its driver.
        """
        found: dict[str, list[str]] = defaultdict(list)
        begun: set[str] = set()
        for row in self.events:
            id = row.get("id", "")
            if row["event"] == "start":
                if id in begun:
                    found[id].append("the driver was killed")
                begun.add(id)
            elif row["event"] == "end":
                begun.discard(id)
                if row.get("cause"):
                    found[id].append(str(row["cause"]))
        return dict(found)

    def latest(self, event: str) -> dict[str, dict[str, Any]]:
        """The last event of a kind for each child."""
        return {str(row["id"]): row for row in self.events if row["event"] == event and "id" in row}
