"""What happens when a run goes wrong: not-a-number losses, and being asked to stop."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain import shapes


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is one line and says what was saved."""


class Interrupted(RuntimeError):
    """A run stopped by the user after its checkpoint was written."""


def save_batch(workdir: Path, step: int, batch: shapes.Batch) -> Path:
    """The batch that broke step `step`, as an .npz to look at."""
    path = workdir / f"nonfinite_step_{step}.npz"
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in batch._asdict().items()}
    np.savez_compressed(path, **arrays)
    return path


@contextlib.contextmanager
def stop_requests():
    """Yields a list that is filled by the first SIGINT or SIGTERM; a second one raises."""
    asked: list[int] = []

    def handle(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals belong to someone else
        yield asked
        return
    try:
        yield asked
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)
