"""A command as a child process, begun again when a compiler or a kernel takes it down or hangs.

A library that aborts, as compilers do on what they did not expect, ends the process that called
it. The command says what it begins; what did not return is told to the next child, which passes it
by and goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_FOLDER = "KERNELS_PALLAS_SUPERVISED"  # where the two processes speak; unset in one on its own
_POLL = 0.2  # seconds


def _folder() -> Path | None:
    name = os.environ.get(_FOLDER)
    return Path(name) if name else None


def begin(what: str) -> str | None:
    """Note that this begins; return why it ended a child before, or None."""
    folder = _folder()
    if folder is None:
        return None
    for line in (folder / "ended").read_text().splitlines():
        before, why = json.loads(line)
        if before == what:
            return why
    (folder / "begun").write_text(what)
    return None


def end(why: str) -> None:
    """End this process as a crash does, with these last words: what it needs is out of order."""
    if file := log():
        file.write_text(f"F0000 ] {why}\n")
    os.abort()


def log() -> Path | None:
    """Return the file to write to what the process prints meanwhile, for the last words of it."""
    folder = _folder()
    return folder and folder / "log"


def supervise(module: str, argv: Sequence[str], *, stall: float | None = None,
              quiet: bool = False) -> int:
    """Run `python -m module argv` until it returns, and return its exit status.

    `quiet` leaves out what it prints, but errors and progress.

    A child that dies of a signal is begun again, and so is one that has begun nothing new in
    `stall` seconds. Only the same end twice in a row is given up, with status 1.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ended").touch()
        last = None
        while True:
            for file in ("begun", "log"):
                (folder / file).write_text("")
            child = subprocess.Popen([sys.executable, "-m", module, *argv],
                                     env=os.environ | {_FOLDER: name},
                                     stdout=subprocess.DEVNULL if quiet else None)
            status = _wait(child, folder, stall)
            if status >= 0:
                return status
            if -status in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                return 128 - status
            what = (folder / "begun").read_text()
            why = _why(-status, stall, (folder / "log").read_text(errors="replace"))
            print(f"{module}: {what or 'the start'}: {why}", file=sys.stderr, flush=True)
            if not what or what == last:
                return 1
            last = what
            with (folder / "ended").open("a") as ended:
                ended.write(json.dumps([what, why]) + "\n")


def _wait(child: subprocess.Popen[bytes], folder: Path, stall: float | None) -> int:
    """Return the child's status; kill it where it stalls, and end it where this process ends."""
    def end(number: int, frame: object) -> None:
        del frame
        child.send_signal(number)

    before = {n: signal.signal(n, end) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while child.poll() is None:
            time.sleep(_POLL)
            begun = (folder / "begun").stat()
            if stall and begun.st_size and time.time() - begun.st_mtime > stall:
                child.kill()
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why(number: int, stall: float | None, log: str) -> str:
    """One line of what ended a child: the compiler's last words, or the signal."""
    found = re.findall(r"^F\d{4}.*?\] (.*)$|^(Fatal Python error.*)$", log, re.MULTILINE)
    words = next((a or b for a, b in found), "")[:160]
    if number == signal.SIGKILL:
        return f"killed: nothing new in {stall:.0f} s, or no memory" if stall else "killed"
    return f"ended the process with {signal.Signals(number).name}" + (f": {words}" if words else "")
