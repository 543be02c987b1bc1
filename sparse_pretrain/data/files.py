"""New folders and files of the cache, readable by whom the umask says.

`tempfile` makes them for their owner alone, and a rename keeps that: another user of the machine
could not read a shared cache.
"""

import os
import uuid
from pathlib import Path


def new_folder(parent: Path, prefix: str) -> Path:
    """An empty folder in `parent` that no other process has."""
    path = Path(parent) / f"{prefix}{uuid.uuid4().hex[:12]}"
    path.mkdir()
    return path


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(fresh, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
