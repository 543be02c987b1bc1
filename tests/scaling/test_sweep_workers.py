"""Workers, retries, and drivers that are killed: nothing lost, nothing run twice."""

import fcntl
import importlib.util
import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from sparse_pretrain.scaling import engines, process, sweep
from sparse_pretrain.scaling.children import children
from sparse_pretrain.scaling.engines.local import Local, shares
from sparse_pretrain.scaling.journal import Journal

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
TRIVIAL = BENCHMARKS / "trivial_child.py"
PREFIX = (sys.executable, "-S", "-E", str(TRIVIAL))

# Ends as its config says; the attempts before count by the lines of its log.
RUNNER = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("trivial_child", {str(TRIVIAL)!r})
trivial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trivial)

def run(arguments):
    flags = dict(a.removeprefix("--").split("=", 1) for a in arguments)
    workdir, how = flags["workdir"], flags.get("config.how", "")
    os.makedirs(workdir, exist_ok=True)
    with open(workdir + "/tries", "a+") as f:
        f.write("x")
        f.seek(0)
        tries = len(f.read())
    print("process", os.getpid())
    if how == "mistake":
        print("error: optim.lr: must be positive")
        return 2
    if how == "raises":
        raise RuntimeError("no such thing")
    if how == "killed once" and tries == 1 or how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return trivial.run(arguments)

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path):
    """A sweep of settings named by how they end, and a way to run it."""

    class Place:
        root = tmp_path / "out"
        runner = tmp_path / "runner.py"
        file = tmp_path / "s.py"

        def sweep(self, hows):
            pairs = [("tiny.py", {"how": how}) for how in hows]
            self.file.write_text(f"def get_sweep():\n    return {pairs!r}\n")
            return children(self.file, self.root)

        def run(self, *, warm, workers=1, retries=1):
            prefix, runner = (sys.executable, "-S", str(self.runner)), f"{self.runner}:run"
            engine = Local(workers=workers, prefix=prefix, warm=warm, runner=runner)
            self.out = io.StringIO()
            console = Console(file=self.out, width=150)
            more = {"workers": workers, "retries": retries, "console": console}
            return sweep.run_sweep(self.file, self.root, engine, **more)

    (tmp_path / "tiny.py").write_text("def get_config(arg=None):\n    return {}\n")
    made = Place()
    made.runner.write_text(RUNNER)
    return made


@pytest.mark.parametrize("warm", [False, True])
def test_ends_are_told_apart_and_crashes_retried(place, warm):
    place.sweep(["mistake", "killed once", "killed", "raises", "", "fine"])
    record = place.run(warm=warm, workers=2, retries=2)
    got = {
        c["overrides"]["how"]: (c["status"], c["cause"], c["attempts"]) for c in record["children"]
    }
    assert got == {
        "mistake": ("failed", "optim.lr: must be positive", 1),
        "killed once": ("finished", "", 2),
        "killed": ("failed", "killed by SIGKILL", 3),
        "raises": ("failed", "RuntimeError: no such thing", 3),
        "": ("finished", "", 1),
        "fine": ("finished", "", 1),
    }
    causes = {c["overrides"]["how"]: c["causes"] for c in record["children"]}
    assert causes["killed once"] == ["killed by SIGKILL"]
    assert causes["killed"] == ["killed by SIGKILL"] * 3
    assert "tiny how=killed once  failed: killed by SIGKILL; again" in place.out.getvalue()
    # the next command tries what failed again, and counts on
    again = place.run(warm=warm, workers=2, retries=0)
    attempts = {c["overrides"]["how"]: c["attempts"] for c in again["children"]}
    assert attempts == {"mistake": 2, "killed once": 2, "killed": 4, "raises": 4, "": 1, "fine": 1}


def test_a_warm_worker_runs_many_in_one_process(place):
    todo = place.sweep([f"x{i}" for i in range(5)])
    assert all(c["status"] == "finished" for c in place.run(warm=True)["children"])
    logs = [c.log.read_text().splitlines() for c in todo]
    assert len({lines[-1] for lines in logs}) == 1  # the process they ran in
    assert all(f"--config.how=x{i}" in lines[0] for i, lines in enumerate(logs))
    assert len(json.loads((place.root / "sweep.json").read_text())["children"]) == 5


def test_what_outlives_its_driver_is_waited_for_and_not_run_again(place):
    (child,) = place.sweep([""])
    claim = process.claim_file(child)
    claim.parent.mkdir(parents=True)
    with open(claim, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def finish():
            time.sleep(0.3)
            child.workdir.mkdir()
            (child.workdir / "summary.json").write_text('{"bits_per_byte": 1.5}')
            (child.workdir / "run.json").write_text('{"status": "finished"}')
            fcntl.flock(held, fcntl.LOCK_UN)

        thread = threading.Thread(target=finish)
        thread.start()
        record = place.run(warm=False)
        thread.join()
    assert record["children"][0]["bits_per_byte"] == 1.5
    assert not (child.workdir / "tries").exists()


def test_a_run_that_gets_further_each_time_costs_no_retry(place, fake_run):
    place.sweep([""])

    class Preempting:
        step = 0

        def run(self, child, asked):
            self.step += 10
            status = "finished" if self.step == 50 else "interrupted"
            fake_run.write(child.workdir, steps=50, done=self.step, status=status)
            return process.Outcome(0 if self.step == 50 else process.INTERRUPTED)

        def close(self):
            pass

    console = Console(file=io.StringIO())
    record = sweep.run_sweep(place.file, place.root, Preempting(), retries=0, console=console)
    assert record["children"][0]["attempts"] == 5
    assert record["children"][0]["status"] == "finished"


def test_one_driver_at_a_time(place):
    place.sweep([""])
    place.root.mkdir()
    with process.driving(place.root):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} is running the sweep in"):
            place.run(warm=False)


def test_kills_lose_nothing_and_run_nothing_twice():
    spec = importlib.util.spec_from_file_location("overhead", BENCHMARKS / "sweep_overhead.py")
    overhead = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(overhead)
    found = overhead.kills(60, 2, True, 4, 0.05, seed=3)
    assert found["kills"]["driver"] >= 1
    assert found["kills"]["run"] >= 1
    assert {k: found[k] for k in ("exit", "finished", "ended", "lost", "run_twice")} == {
        "exit": 0,
        "finished": 60,
        "ended": 60,
        "lost": 0,
        "run_twice": 0,
    }


def test_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path)
    journal.write("start", id="a")
    journal.write("end", id="a", status="failed", cause="killed by SIGKILL")
    journal.write("start", id="a")
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b'{"event": "start", "id": "b"')
    journal = Journal(tmp_path)
    journal.write("start", id="a")
    journal.close()
    journal = Journal(tmp_path)
    assert journal.attempts() == {"a": 3}
    assert journal.causes() == {"a": ["killed by SIGKILL", "the driver was killed"]}
    journal.close()


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 11}, raising=False)
    assert shares(1) == [()]
    assert shares(2) == [(2, 3), (5, 7, 11)]
    assert shares(6) == [()] * 6


def test_engines_and_options_that_there_are_not(tmp_path):
    more = {"workers": 1, "root": tmp_path}
    with pytest.raises(ValueError, match="--engine: 'rai' is not one of local, ray, slurm"):
        engines.make("rai", options={}, **more)
    with pytest.raises(ValueError, match="--option: 'gpu' of the engine local is not one of gpus"):
        engines.make("local", options={"gpu": "1"}, **more)
