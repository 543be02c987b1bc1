"""A run that does nothing but leave a run's files: what a sweep costs without its runs.

Takes what `sparse-pretrain train` takes, as a function (`run`) or as a program. $TRIVIAL_SECONDS is
how long it lasts. $TRIVIAL_LEDGER gets a line for each begin (with the process), each end, and each
`twice`: a run that was begun or ended after it had ended, or begun while it was being run.
"""

import fcntl
import json
import os
import sys
import time


def run(arguments: list[str]) -> int:
    """One run; its end is one link, which either is there or is not."""
    flags = dict(a.removeprefix("--").split("=", 1) for a in arguments)
    folder = flags["workdir"]
    name = os.path.basename(folder)
    os.makedirs(folder, exist_ok=True)
    done = os.path.join(folder, "run.json")
    with open(os.path.join(folder, "held"), "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _note("twice", name)
            return 1
        _note("begin", name)
        if os.path.exists(done):
            _note("twice", name)
            return 1
        time.sleep(float(os.environ.get("TRIVIAL_SECONDS", "0")))
        bits = 2.0 + float(flags.get("config.optim.lr", "0")) % 1
        _write(os.path.join(folder, "summary.json"), {"bits_per_byte": bits, "steps": 1})
        record = {"name": "trivial", "status": "finished", "pid": os.getpid()}
        _write(done + ".new", record)
        try:
            os.link(done + ".new", done)
        except FileExistsError:
            _note("twice", name)
            return 1
        _note("end", name)
    return 0


def _write(path: str, content: dict) -> None:
    with open(path + ".tmp", "w") as file:
        json.dump(content, file)
    os.replace(path + ".tmp", path)


def _note(event: str, name: str) -> None:
    if ledger := os.environ.get("TRIVIAL_LEDGER"):
        file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{event} {name} {os.getpid()}\n".encode())
        os.close(file)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
