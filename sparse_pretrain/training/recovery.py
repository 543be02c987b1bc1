"""What happens when a run goes wrong: not-a-number losses, and being asked to stop."""

import contextlib
import os
import signal
from pathlib import Path
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

from sparse_pretrain import shapes


@contextlib.contextmanager
def alone(workdir: Path):
    """Holds the workdir for this process, which the system lets go of however it ends.

    It is made where it is not there, and goes again when nothing was written to it.
    Errors: ValueError naming the workdir and the other process when one is writing there.
    """
    with contextlib.ExitStack() as stack:
        if not workdir.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, workdir)
        if fcntl is None:
            yield
            return
        path = workdir / ".lock"
        file = stack.enter_context(open(path, "a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # one that ended in between has taken its file away: hold the one that others will find
            while not _names(path, file):
                file = stack.enter_context(open(path, "a+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "unknown"
            raise ValueError(
                f"--workdir: process {other} is training in {workdir}; wait for it or use another"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        stack.callback(path.unlink, missing_ok=True)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _names(path: Path, file: IO[str]) -> bool:
    """Whether the path still leads to this open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is one line and says what was saved."""


class Interrupted(RuntimeError):
    """A run stopped by the user after its checkpoint was written."""


class Abandoned(Interrupted):
    """A run stopped by the user's second request, while a checkpoint may be half-written."""


class Twice(KeyboardInterrupt):
    """The second request to stop."""


def save_batch(workdir: Path, step: int, batch: shapes.Batch) -> Path:
    """The batch that broke step `step`, as an .npz to look at."""
    path = workdir / f"nonfinite_step_{step}.npz"
    fields = {k: v for k, v in batch._asdict().items() if v is not None}
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in fields.items()}
    np.savez_compressed(path, **arrays)
    return path


@contextlib.contextmanager
def interruptible():
    """SIGINT and SIGTERM raise KeyboardInterrupt, also where a shell had them ignored."""

    def handle(number, frame):
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextlib.contextmanager
def stop_requests():
    """Yields a list that is filled by the first SIGINT or SIGTERM; a second one raises Twice."""
    asked: list[int] = []

    def handle(number, frame):
        if asked:
            raise Twice
        asked.append(number)
        with contextlib.suppress(OSError):  # not by print, which a signal may have interrupted
            os.write(2, b"stopping after this step; once more stops at once, saving nothing\n")

    with _handled_by(handle):
        yield asked


@contextlib.contextmanager
def _handled_by(handle):
    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals belong to someone else
        yield
        return
    try:
        yield
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)
