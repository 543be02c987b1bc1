"""Sweeps with a fake trainer: identity, resuming, failures, interruption and the ranked result."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import scipy.stats
from rich.console import Console

from sparse_pretrain.scaling import combinators, sweep
from sparse_pretrain.scaling.children import children, load
from sparse_pretrain.scaling.engines.local import Local

FAKE_RUN = Path(__file__).parents[1] / "report" / "fake_run.py"

# A trainer that takes what the real one takes, and finishes, fails or hangs as its config says.
TRAINER = f"""
import importlib.util, json, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("fake_run", {str(FAKE_RUN)!r})
fake_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_run)
flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
workdir = Path(flags.pop("workdir"))
config = flags.pop("config")
flags = {{k.removeprefix("config."): v for k, v in flags.items()}}
with open({{calls!r}}, "a") as f:
    f.write(workdir.name + "\\n")
lr, seed = float(flags.get("optim.lr", 0.002)), int(flags.get("seed", 0))
if lr < 0:
    print(f"error: optim.lr: must be positive, got {{lr}}")
    sys.exit(2)
if lr > 1:
    os.kill(os.getpid(), signal.SIGKILL)
resumed = workdir.exists()
if lr == 0.5 and not resumed:
    fake_run.write(workdir, steps=40, done=20, status="running", pid=os.getpid())
    def stop(*unused):
        fake_run.write(workdir, steps=40, done=25, status="interrupted")
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    time.sleep(60)
bits = 2.0 + lr + 0.01 * seed + 0.001 * ((7 * seed) % 3) * lr
fake_run.write(workdir, steps=40, seed=seed, bits=bits, config={{"optim": {{"lr": lr}}}})
print("done")
"""


@pytest.fixture
def place(tmp_path):
    """A folder with an experiment, a trainer, and a way to write sweep files."""

    class Place:
        root = tmp_path / "out"
        calls = tmp_path / "calls.txt"
        trainer = tmp_path / "trainer.py"
        experiment = tmp_path / "experiments" / "tiny.py"

        def engine(self, prefix=None, workers=1):
            return Local(workers=workers, prefix=prefix or (sys.executable, str(self.trainer)))

        def file(self, body):
            path = tmp_path / "experiments" / "sweeps" / "s.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "from sparse_pretrain.scaling.combinators import *\n" + textwrap.dedent(body)
            path.write_text(text)
            return path

        def run(self, file, prefix=None, workers=1, terminal=False, **more):
            self.out = io.StringIO()
            console = Console(file=self.out, force_terminal=terminal, width=150)
            engine, more = self.engine(prefix, workers), {"retries": 0, "workers": workers} | more
            return sweep.run_sweep(file, self.root, engine, console=console, **more)

        def called(self):
            return self.calls.read_text().split() if self.calls.exists() else []

    made = Place()
    made.experiment.parent.mkdir()
    made.experiment.write_text('"""Record: 2.1."""\n\ndef get_config(arg=None):\n    return {}\n')
    made.trainer.write_text(TRAINER.replace("{calls!r}", repr(str(made.calls))))
    return made


@pytest.fixture(autouse=True)
def listens_to_interrupts():
    """A shell's background job, and what it starts, ignores Ctrl-C unless told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


GRID = """
def get_sweep():
    seeds = param("seed", range(3))
    return runs("experiments/tiny.py", prod(param("optim.lr", [0.02, 0.01]), seeds))
"""


def test_ranks_skips_and_writes(place):
    file = place.file(GRID)
    record = place.run(file)
    assert [c["status"] for c in record["children"]] == ["finished"] * 6
    assert len(place.called()) == 6
    assert [r["arm"] for r in record["ranking"]] == ["tiny optim.lr=0.01", "tiny optim.lr=0.02"]

    def bits(lr, seed):
        return 2.0 + lr + 0.01 * seed + 0.001 * ((7 * seed) % 3) * lr

    low = [bits(0.01, s) for s in range(3)]
    assert record["ranking"][0]["bits_per_byte"] == pytest.approx(sum(low) / 3)
    assert record["ranking"][0]["by_seed"] == pytest.approx(dict(enumerate(low)))
    (difference,) = record["differences"]
    want = scipy.stats.ttest_rel(low, [bits(0.02, s) for s in range(3)]).confidence_interval()
    assert difference["baseline"] == "tiny optim.lr=0.02"
    assert [difference["low"], difference["high"]] == pytest.approx([want.low, want.high])
    assert difference["verdict"] == "lower"
    assert json.loads((place.root / "sweep.json").read_text()) == json.loads(json.dumps(record))
    page = (place.root / "sweep.html").read_text()
    assert "tiny optim.lr=0.01" in page
    table = [x for x in place.out.getvalue().splitlines() if re.match(r"[12] +tiny", x)]
    assert table[0].startswith("1  tiny optim.lr=0.01     2.0")
    assert "lower" in table[0]
    again = place.run(file)
    assert len(place.called()) == 6  # nothing ran again
    assert again == record


def test_failures_are_told_apart_and_do_not_stop_the_rest(place):
    file = place.file(
        'def get_sweep():\n    return runs("experiments/tiny.py", '
        'param("optim.lr", [-1.0, 2.0, 0.01]))\n'
    )
    record = place.run(file)
    assert [(c["status"], c["cause"]) for c in record["children"]] == [
        ("failed", "optim.lr: must be positive, got -1.0"),
        ("failed", "killed by SIGKILL"),
        ("finished", ""),
    ]
    assert [r["arm"] for r in record["ranking"]] == ["tiny optim.lr=0.01"]
    out = place.out.getvalue()
    assert "failed: tiny optim.lr=-1.0: optim.lr: must be positive" in out
    log = place.root / record["children"][0]["log"]
    assert "--config.optim.lr=-1.0" in log.read_text()
    place.run(file)
    names = [c["workdir"] for c in record["children"]]
    assert place.called() == [*names, *names[:2]]  # failed ones are tried again


def test_a_child_that_ends_without_a_result_failed(place):
    file = place.file('def get_sweep():\n    return [("experiments/tiny.py", {})]\n')
    record = place.run(file, (sys.executable, "-c", ""))
    assert record["children"][0]["status"] == "failed"
    assert record["children"][0]["cause"] == "run.json is missing"
    record = place.run(file, (sys.executable, "-c", "raise SystemExit(3)"))
    assert record["children"][0]["cause"] == "run.json is missing"


def test_interrupt_lets_the_child_save_and_resumes(place):
    file = place.file(
        'def get_sweep():\n    return runs("experiments/tiny.py", '
        'param("optim.lr", [0.01, 0.5, 0.02]))\n'
    )
    waiting = children(file, place.root)[1].workdir

    def interrupt():
        rows = waiting / "metrics.jsonl"
        while not (rows.exists() and rows.stat().st_size):  # then the child is in its steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    record = place.run(file)
    thread.join()
    assert record["interrupted"]
    assert [c["status"] for c in record["children"]] == ["finished", "interrupted", "waiting"]
    saved = json.loads((waiting / "run.json").read_text())
    assert saved["status"] == "interrupted"  # written by the child, which had its time to save
    assert "the same command goes on" in place.out.getvalue()
    assert json.loads((place.root / "sweep.json").read_text())["interrupted"]
    record = place.run(file)
    assert [c["status"] for c in record["children"]] == ["finished"] * 3
    assert "resuming" in place.out.getvalue()
    names = [c["workdir"] for c in record["children"]]
    assert place.called() == [names[0], names[1], names[1], names[2]]


def test_polite_kill_does_what_an_interrupt_does(place):
    file = place.file(
        'def get_sweep():\n    return runs("experiments/tiny.py", param("optim.lr", [0.5]))\n'
    )
    code = f"""
import sys
from sparse_pretrain.scaling import sweep
from sparse_pretrain.scaling.engines.local import Local
engine = Local(workers=1, prefix=(sys.executable, {str(place.trainer)!r}))
sweep.run_sweep({str(file)!r}, {str(place.root)!r}, engine)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    workdir = children(file, place.root)[0].workdir
    end = time.monotonic() + 60
    while not (workdir / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert json.loads((workdir / "run.json").read_text())["status"] == "interrupted"
    assert json.loads((place.root / "sweep.json").read_text())["interrupted"]


def test_a_child_trained_by_another_process_is_left_alone(place, fake_run):
    import platform

    file = place.file('def get_sweep():\n    return [("experiments/tiny.py", {})]\n')
    child = children(file, place.root)[0]
    pid = os.getpid()
    fake_run.write(child.workdir, steps=20, status="running", pid=pid, host=platform.node())
    record = place.run(file)
    assert record["children"][0]["cause"] == f"process {pid} is training it already"
    assert place.called() == []


def test_identity_follows_from_content(place):
    file = place.file(GRID)
    before = [c.id for c in children(file, place.root)]
    assert len(set(before)) == 6
    assert [c.id for c in children(file, "elsewhere")] == before
    text = place.experiment.read_text()
    place.experiment.write_text("# a remark\n" + text.replace("2.1", "2.05, measured again"))
    assert [c.id for c in children(file, place.root)] == before
    place.experiment.write_text(text.replace("{}", "{'steps': 1}"))
    assert not set(before) & {c.id for c in children(file, place.root)}


def test_equal_children_run_once_and_order_of_keys_is_nothing(place):
    file = place.file("""
    def get_sweep():
        return [("experiments/tiny.py", {"a": 1, "b": 2}),
                ("experiments/tiny.py", {"b": 2, "a": 1}),
                ("experiments/tiny.py:small", {"a": 1, "b": 2})]
    """)
    found = children(file, place.root)
    assert [c.label for c in found] == ["tiny", "tiny:small"]
    assert found[1].config == f"{place.experiment}:small"


def test_labels_leave_out_what_all_children_share(place):
    file = place.file("""
    def get_sweep():
        grid = prod([{"steps": 5, "betas": [1, 2]}], param("seed", [0, 1]), param("lr", [0.1, 1]))
        return runs("experiments/tiny.py", grid) + [("experiments/tiny.py", {"extra": 1})]
    """)
    labels = [c.label for c in children(file, place.root)]
    assert labels[:2] == [
        "tiny steps=5 betas=(1, 2) lr=0.1 seed=0",
        "tiny steps=5 betas=(1, 2) lr=1 seed=0",
    ]
    assert labels[-1] == "tiny extra=1"
    file.write_text(file.read_text().replace(' + [("experiments/tiny.py", {"extra": 1})]', ""))
    labels = [c.label for c in children(file, place.root)]
    assert labels == [
        "tiny lr=0.1 seed=0",
        "tiny lr=1 seed=0",
        "tiny lr=0.1 seed=1",
        "tiny lr=1 seed=1",
    ]


def test_command_line_of_a_child(place):
    file = place.file("""
    def get_sweep():
        return [("experiments/tiny.py:x=1", {"model.tie": True, "optim.betas": [0.9, 0.99],
                 "data.source": "text_folder:/a b", "seed": 3})]
    """)
    (child,) = children(file, place.root)
    assert child.arguments() == [
        f"--config={place.experiment}:x=1",
        "--config.model.tie=true",
        "--config.optim.betas=(0.9, 0.99)",
        "--config.data.source=text_folder:/a b",
        "--config.seed=3",
        f"--workdir={child.workdir}",
    ]
    assert "seed" not in child.arm


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\n", r"defines no get_sweep"),
        ("def get_sweep(): return []\n", r"get_sweep\(\) is empty"),
        ("def get_sweep(): return ['a']\n", r"entry 0 is not \(experiment, \{key: value\}\): 'a'"),
        ("def get_sweep(): return [('no.py', {})]\n", r"s\.py: there is no file 'no\.py'"),
        ("def get_sweep(): return [('quickstrat', {})]\n", r"did you mean quickstart\.py\?"),
        ("def get_sweep(: pass\n", r"SyntaxError"),
        ("def get_sweep(): raise KeyError('k')\n", r"KeyError: 'k'"),
        ("def get_sweep(): return runs('a', prod(param('k', [1]), param('k', [2])))", "k: set twi"),
    ],
)
def test_bad_sweep_files(place, body, message):
    with pytest.raises(ValueError, match=message):
        children(place.file(body), place.root)
    with pytest.raises(ValueError, match="no file"):
        load(place.root / "absent.py")


def test_shipped_experiments_go_by_their_names_anywhere(place, monkeypatch):
    monkeypatch.chdir(place.experiment.parent.parent)
    names = ("dense_baseline", "quickstart.py", "experiments/quickstart.py", "nanogpt_char:x")
    pairs = [(name, {"seed": 1}) for name in names]
    todo = children(place.file(f"def get_sweep(): return {pairs!r}\n"), place.root)
    shipped = Path(__file__).parents[2] / "experiments"
    files = [f"{shipped / 'dense_baseline.py'}", f"{shipped / 'quickstart.py'}"]
    assert [c.config for c in todo] == [*files, f"{shipped / 'nanogpt_char.py'}:x"]
    # a file of the user's own goes before one that ships
    (place.experiment.parent / "quickstart.py").write_text("def get_config(): return {}\n")
    (_, own) = children(place.file(f"def get_sweep(): return {pairs[:3]!r}\n"), place.root)
    assert own.config == str(place.experiment.parent / "quickstart.py")


def test_terminal_shows_a_line_per_child(place, monkeypatch):
    file = place.file('def get_sweep():\n    return [("experiments/tiny.py", {})]\n')
    monkeypatch.setattr(sweep, "LOOK", 0.02)
    place.run(file, terminal=True)
    out = place.out.getvalue()
    assert "0/1 done" in out
    assert "starting" in out
    assert "[1/1] tiny  finished: 2.0020 bits/byte" in out


def test_combinators():
    lr, size = combinators.param("lr", [1, 2]), combinators.param("size", "ab")
    assert combinators.prod(lr, size) == [
        {"lr": x, "size": y} for x, y in itertools.product([1, 2], "ab")
    ]
    assert combinators.prod() == [{}]
    assert combinators.zipit(lr, size) == [{"lr": 1, "size": "a"}, {"lr": 2, "size": "b"}]
    assert combinators.chain(lr, size) == [{"lr": 1}, {"lr": 2}, {"size": "a"}, {"size": "b"}]
    many = combinators.param("x", range(100))
    picked = combinators.sample(many, 10, seed=1)
    assert picked == combinators.sample(many, 10, seed=1) != combinators.sample(many, 10, seed=2)
    assert [p["x"] for p in picked] == sorted({p["x"] for p in picked})
    assert combinators.runs("e.py", lr) == [("e.py", {"lr": 1}), ("e.py", {"lr": 2})]
    with pytest.raises(ValueError, match=r"equal lengths, got \[2, 3\]"):
        combinators.zipit(lr, combinators.param("k", range(3)))
    with pytest.raises(ValueError, match="count: 3 of a sweep of 2"):
        combinators.sample(lr, 3)
