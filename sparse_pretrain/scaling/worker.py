"""A process that runs many children of a sweep, one after the other: `python -m ... RUNNER`.

It reads an order a line ({"arguments", "workdir", "log"}) and answers a line ({"code", "words"}).
RUNNER is MODULE:FUNCTION or FILE.py:FUNCTION, called with what `sparse-pretrain train` gets and
returning an exit code. When its driver is gone it finishes the child it has and ends; who runs the
sweep next waits for that child, which is claimed until this process ends.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling import process
from sparse_pretrain.scaling.children import Child

Runner = Callable[[list[str]], int]


def find(runner: str) -> Runner:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names."""
    place, _, name = runner.rpartition(":")
    if place.endswith(".py"):
        found = importlib.util.spec_from_file_location("sparse_pretrain_runner", place)
        assert found is not None, place
        assert found.loader is not None, place
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def run_one(child: Child, arguments: list[str], runner: Runner) -> process.Outcome:
    """As `process.execute`, in this process."""
    try:
        with process.claimed(
            child, lambda: 0
        ) as claim:  # asked to stop, this process is interrupted
            assert claim is not None
            if workdir.read(child.workdir, rows=False).status == "finished":
                return process.Outcome(0)
            with process.opened_log(child, [*process.PREFIX, *arguments]) as log:
                start = log.tell()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                try:
                    code = _guarded(arguments, runner)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    _silence(1, 2)
            return process.Outcome(code, process.last_words(child.log, start))
    except KeyboardInterrupt:
        return process.Outcome(process.INTERRUPTED)


def _guarded(arguments: list[str], runner: Runner) -> int:
    try:
        return runner(arguments)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except Exception:
        traceback.print_exc()
        return 1


def _silence(*files: int) -> None:
    with open(os.devnull, "r+b") as null:
        for file in files:
            os.dup2(null.fileno(), file)


def main(runner: str) -> int:
    """Run the children that come in, until no more do."""
    orders = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _silence(0, 1)
    function = find(runner)
    _silence(2)
    for line in orders:
        order = json.loads(line)
        folder = Path(order["workdir"])
        child = Child(folder.name, "", "", {}, folder, Path(order["log"]), "")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            outcome = run_one(child, order["arguments"], function)
        except KeyboardInterrupt:  # between its last step and here
            outcome = process.Outcome(process.INTERRUPTED)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            answers.flush()
        except BrokenPipeError:  # the driver is gone; what the child reached is in its workdir
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
