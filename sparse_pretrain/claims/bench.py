"""What a claim's experiment is given: public data, sizes by scale, and a place for its runs."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sparse_pretrain.claims import base
from sparse_pretrain.scaling.published import files

SCALES = ("laptop", "h200")
T = TypeVar("T")


@dataclasses.dataclass
class Bench:
    """One claim's workplace. `folder` holds its runs; `say` prints a line of progress.

    `flops` and `seconds` add up over the runs, those that were finished before among them.
    """

    folder: Path
    scale: str = "laptop"
    say: Callable[[str], None] = print
    flops: float = 0.0
    seconds: float = 0.0
    commits: set[str] = dataclasses.field(default_factory=set)

    def data(self, name: str) -> Path:
        """A public file. Errors: NotRun saying where it can be had."""
        try:
            return files.find(name)
        except files.Absent as e:
            raise base.NotRun(str(e)) from None

    def size(self, laptop: T, h200: T) -> T:
        """The number that this scale takes."""
        return laptop if self.scale == "laptop" else h200

    def kept(self, label: str, content: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make()` returns, found in the claim's folder when it was made before.

        `content` is all that decides it: other content, other file. It adds `flops` and `seconds`.
        """
        from sparse_pretrain.training import metrics, record

        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        file = self.folder / f"{label}-{digest.hexdigest()[:8]}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
        else:
            found = metrics.plain(make() | {"commit": record.commit()})
            file.parent.mkdir(parents=True, exist_ok=True)
            record.write_json(file, found)
        self.flops += found["flops"]
        self.seconds += found["seconds"]
        self.commits.add(found["commit"])
        return found
