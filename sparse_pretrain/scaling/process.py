"""One child as a process of its own: alone at its work, its output in its log, its end understood.

Used by every engine, on whatever machine the child runs.
"""

import contextlib
import dataclasses
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling.children import Child

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

PREFIX = (sys.executable, "-m", "sparse_pretrain", "train")
GRACE_SECONDS = 120  # what an interrupted child has for saving its checkpoint
TICK = 0.25  # seconds between two looks at whether a child is asked to stop
MISTAKE, INTERRUPTED = 2, 130  # exit codes, as the command line's
STOP, KILL = 1, 2  # what `asked` answers: save and end, end at once

Asked = Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attempt ended: an exit code (negative: the signal), and the last words of its log.

    `lost` says that the machine or the process that held the child went away.
    """

    code: int
    words: str = ""
    lost: bool = False


def claim_file(child: Child) -> Path:
    """The file whose lock says that a process is at work on the child."""
    return child.workdir.parent / ".claims" / child.workdir.name


@contextlib.contextmanager
def claimed(child: Child, asked: Asked) -> Iterator[IO[Any] | None]:
    """Holds the child, waiting while a process that outlived its driver does; None when asked to
    stop meanwhile.

    A process that is handed the file keeps the child held until it ends, however that is.
    """
    path = claim_file(child)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        while not _lock(file):
            if asked():
                yield None
                return
            time.sleep(0.05)
        yield file


def _lock(file: IO[Any]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_free(child: Child) -> bool:
    """Whether no process is at work on the child."""
    try:
        with open(claim_file(child), "ab") as file:
            return _lock(file)
    except OSError:
        return True


@contextlib.contextmanager
def driving(root: Path) -> Iterator[None]:
    """Holds a sweep's folder for this process, which the system lets go of however it ends.

    Errors: ValueError naming the folder and the process that drives the sweep there.
    """
    with open(root / ".driver", "a+") as file:
        if not _lock(file):
            file.seek(0)
            other = file.read().strip() or "unknown"
            raise ValueError(
                f"--workdir: process {other} is running the sweep in {root}; wait for it or use "
                "another"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def trained_by(run: workdir.Run) -> int | None:
    """The process that trains in a workdir now, if one does."""
    pid, lock = run.run.get("pid"), run.path / ".lock"
    if run.status != "running" or not isinstance(pid, int):
        return None
    if fcntl is not None and lock.is_file():  # a pid may have gone to another process since
        with open(lock, "ab") as file:
            return None if _lock(file) else pid
    return pid


def execute(
    child: Child,
    prefix: Sequence[str] = PREFIX,
    asked: Asked = lambda: 0,
    *,
    cores: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a child to its end, or wait for the process that already does.

    Asked to stop, the child gets one interrupt and time to save; asked again, it is killed. What
    is finished when its turn comes is left alone.
    """
    with claimed(child, asked) as claim:
        if claim is None:
            return Outcome(INTERRUPTED)
        if workdir.read(child.workdir, rows=False).status == "finished":
            return Outcome(0)
        if asked():
            return Outcome(INTERRUPTED)
        command = [*prefix, *child.arguments()]
        with opened_log(child, command) as log:
            start = log.tell()
            # Its own session: the terminal's Ctrl-C must reach it once, through us, and not twice.
            with _heard_interrupts():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(claim.fileno(),),
                    env={**os.environ, **environment} if environment else None,
                )
            pin(process.pid, cores)
            code = wait(process, asked)
        return Outcome(code, last_words(child.log, start))


@contextlib.contextmanager
def _heard_interrupts() -> Iterator[None]:
    """What starts in here hears an interrupt; Ray's processes block it, and theirs inherit that."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def opened_log(child: Child, command: Sequence[str]) -> Iterator[IO[bytes]]:
    """The child's log, at its end, behind the command that is about to write there."""
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with open(child.log, "ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        yield log


def pin(pid: int, cores: Sequence[int]) -> None:
    """Keeps a process that has just begun on some of the cores, where the system can do that."""
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # it has ended already, or a container forbids it
            os.sched_setaffinity(pid, cores)


def wait(process: subprocess.Popen, asked: Asked) -> int:
    """Its exit status; see `execute` for how it is stopped."""
    deadline = float("inf")
    while True:
        code = _within_a_tick(process)
        if code is not None:
            return code
        wish = asked()
        if wish == KILL or time.monotonic() > deadline:
            process.kill()
        elif wish == STOP and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
            interrupt(process)


def _within_a_tick(process: subprocess.Popen) -> int | None:
    """The exit status if it ends within a tick, as soon as it does."""
    if not hasattr(os, "pidfd_open"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=TICK)  # looks every 50 ms
        return None
    if process.poll() is None:
        file = os.pidfd_open(process.pid)  # not collected yet, so the number is still its own
        try:
            select.select([file], [], [], TICK)
        finally:
            os.close(file)
    return process.poll()


def interrupt(process: subprocess.Popen) -> None:
    """What Ctrl-C does."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)


def last_words(log: Path, start: int) -> str:
    """The last line that a child printed in this attempt."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [x.strip() for x in text.splitlines() if x.strip() and not x.startswith("$ ")]
    return lines[-1].removeprefix("error: ") if lines else ""


def judge(outcome: Outcome, run: workdir.Run) -> tuple[str, str]:
    """(finished, interrupted or failed; the cause), from how it ended and what it left."""
    if run.status == "finished" and (outcome.code <= 0 or outcome.lost):
        return "finished", ""  # killed between its last word and its end: nothing is missing
    if outcome.code == MISTAKE and not outcome.lost:
        return "failed", outcome.words or run.cause or f"exit status {outcome.code}"
    if run.run.get("status") == "interrupted":
        return "interrupted", run.cause or "stopped from outside; run again to resume"
    if outcome.lost:
        return "failed", outcome.words or "its machine went away"
    if outcome.code < 0:
        with contextlib.suppress(ValueError):
            return "failed", f"killed by {signal.Signals(-outcome.code).name}"
    if outcome.code == INTERRUPTED:
        return "interrupted", "stopped from outside; run again to resume"
    if outcome.code == 0:
        return "failed", run.cause or "ended without a result"
    return "failed", outcome.words or run.cause or f"exit status {outcome.code}"


def worth_a_retry(status: str, outcome: Outcome, run: workdir.Run) -> bool:
    """Whether another attempt can end otherwise.

    A mistake stays one; and since runs are deterministic, so does a failure that the run itself has
    recorded, such as a loss that is not finite.
    """
    if status == "interrupted":
        return True
    recorded = run.run.get("status") == "failed"
    return status == "failed" and outcome.code != MISTAKE and not recorded
