"""Searches over a made-up landscape: chosen by Optuna, the same whatever happens meanwhile."""

import io
import json
import math
import random
import sys
import time

import pytest
from rich.console import Console

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling import combinators, process, sweep
from sparse_pretrain.scaling.combinators import choice, integers, log_uniform, param, uniform

optuna = pytest.importorskip("optuna", reason="extra 'sweep': optuna is not installed")

STEPS = (10, 20, 30, 40)
SPACE = 'log_uniform("optim.lr", 1e-4, 1e-1), integers("model.width", 32, 128, step=32)'


def landscape(overrides, step=STEPS[-1]):
    """Best at lr 3e-3 and width 96; the order at a step is the order at the end."""
    lr, width = overrides["optim.lr"], overrides.get("model.width", 96)
    end = 1.5 + 0.1 * (math.log10(lr) - math.log10(3e-3)) ** 2 + 1e-5 * (width - 96) ** 2
    return end + 1.0 / step


class Fake:
    """An engine whose children write evaluations one by one, in threads, at their own pace."""

    def __init__(self, shuffle=0, die_after=10**9):
        self.random, self.die_after = random.Random(shuffle), die_after
        self.begun, self.stopped, self.steps = [], [], 0

    def run(self, child, asked):
        self.begun.append(child.id)
        if len(self.begun) > self.die_after:
            return process.Outcome(-9)
        folder = child.workdir
        folder.mkdir(parents=True, exist_ok=True)
        record = {"status": "running", "derived": {"steps": STEPS[-1]}}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "eval.jsonl").write_text("")
        for step in STEPS:
            row = {"step": step, "bits_per_byte": landscape(child.overrides, step)}
            with open(folder / "eval.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.steps += 1
            pause = 0.002 * self.random.random()
            for _ in range(20 if step < STEPS[-1] else 0):
                time.sleep(pause / 4)
                if asked():
                    self.stopped.append(child.id)
                    record["status"] = "interrupted"
                    (folder / "run.json").write_text(json.dumps(record))
                    return process.Outcome(process.INTERRUPTED)
        summary = {"bits_per_byte": landscape(child.overrides), "steps": STEPS[-1]}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "run.json").write_text(json.dumps(record | {"status": "finished"}))
        return process.Outcome(0)

    def close(self):
        pass


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Writes a search and runs it on a fake engine; what its trials were and reached."""
    monkeypatch.setattr(sweep, "LOOK", 0.005)
    (tmp_path / "tiny.py").write_text("def get_config(arg=None):\n    return {}\n")

    class Place:
        def search(self, arguments, space=SPACE):
            text = "from sparse_pretrain.scaling.combinators import *\n\ndef get_sweep():\n"
            text += f'    return [search("tiny.py", [{space}], {arguments})]\n'
            (tmp_path / "s.py").write_text(text)
            return self

        def run(self, folder, engine=None, workers=1, retries=0):
            console = Console(file=io.StringIO(), width=150)
            self.root = tmp_path / folder
            more = {"workers": workers, "retries": retries, "console": console}
            return sweep.run_sweep(tmp_path / "s.py", self.root, engine or Fake(), **more)

    return Place()


def trials(record):
    """(state, value, overrides) of each trial."""
    (found,) = record["searches"]
    return [(r["state"], r["value"], r["overrides"]) for r in found["rows"]]


def test_tpe_finds_what_random_search_does_not_and_counts_its_trials(place):
    found = {}
    for sampler in ("tpe", "random"):
        place.search(f"trials=24, sampler={sampler!r}, parallel=2, seed=1")
        (summary,) = place.run(sampler, workers=2)["searches"]
        assert summary["complete"] == summary["trials"] == 24
        found[sampler] = summary
        values = [row["value"] for row in summary["rows"]]
        assert summary["best"]["value"] == min(values)
        for row in summary["rows"]:
            assert row["value"] == landscape(row["overrides"])
            assert 1e-4 <= row["overrides"]["optim.lr"] <= 1e-1
            assert row["overrides"]["model.width"] in (32, 64, 96, 128)
    late = {k: sum(r["value"] for r in s["rows"][12:]) for k, s in found.items()}
    assert late["tpe"] < late["random"]
    # the oracle: Optuna's own loop over the same landscape, from its journal
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(place.root / "search.jsonl"))
    )
    study = optuna.load_study(study_name=found["random"]["study"], storage=storage)
    assert study.best_value == found["random"]["best"]["value"]
    assert len(study.trials) == 24
    page = (place.root / "sweep.html").read_text()
    best = found["random"]["best"]
    assert f'data-value="{best["value"]!r}"' in page
    for part in ("search-0", "trials-0", "key-0-0", "key-0-1", "ranking"):
        assert f'id="{part}"' in page
    assert "24 complete" in page


@pytest.mark.parametrize(
    "arguments", ["sampler='tpe'", "sampler='cma'", "pruner='asha', warmup=10"]
)
def test_the_same_for_any_workers_pace_and_kill(place, arguments):
    place.search(f"trials=12, parallel=3, seed=5, {arguments}")
    want = trials(place.run("calm"))
    assert trials(place.run("hasty", Fake(shuffle=3), workers=5)) == want
    # a driver whose engine dies under it, and one that goes on from what the first has left
    place.run("killed", Fake(shuffle=1, die_after=5), workers=2)
    before = {p.name for p in workdir.find(place.root) if workdir.read(p).status == "finished"}
    with open(place.root / "search.jsonl", "ab") as file:
        file.write(b'{"op_code": 6, "torn')
    engine = Fake(shuffle=2)
    assert trials(place.run("killed", engine, workers=3)) == want
    assert before
    assert not {name.rpartition("-")[2] for name in before} & set(engine.begun)


def test_pruning_saves_steps_and_never_loses_the_best(place):
    place.search("trials=16, parallel=2, sampler='random', pruner='asha', warmup=10, factor=3")
    engine = Fake()
    (pruned,) = place.run("asha", engine)["searches"]
    place.search("trials=16, parallel=2, sampler='random'")
    full = Fake()
    (whole,) = place.run("whole", full)["searches"]
    assert pruned["complete"] + pruned["pruned"] == pruned["trials"] == 16
    assert pruned["pruned"] >= 4
    assert engine.stopped
    assert engine.steps < full.steps == 16 * len(STEPS)
    assert pruned["best"]["overrides"] == whole["best"]["overrides"]
    states = {
        c["id"]: c["status"]
        for c in json.loads((place.root / "sweep.json").read_text())["children"]
    }
    assert set(states.values()) == {"finished"}


def test_pruned_runs_stay_pruned(place):
    place.search("trials=10, parallel=1, sampler='random', pruner='median', seed=2")
    first = place.run("median", Fake())
    engine = Fake()
    again = place.run("median", engine)
    assert trials(again) == trials(first)
    assert engine.begun == []
    states = [{c["id"]: c["status"] for c in record["children"]} for record in (first, again)]
    assert states[0] == states[1]
    assert set(states[0].values()) == {"finished", "pruned"}
    # without pruning they are run to their end, and no others
    place.search("trials=10, parallel=1, sampler='random', seed=2")
    assert {s for s, *_ in trials(place.run("median", engine))} == {"complete"}
    assert set(engine.begun) == {id for id, s in states[0].items() if s == "pruned"}


def test_grid_is_every_point_once(place):
    place.search(
        "trials=99, sampler='grid', parallel=2",
        'choice("a", [1, 2, 3]), choice("optim.lr", [0.01, 0.1])',
    )
    (found,) = place.run("grid", workers=2)["searches"]
    got = {(r["overrides"]["a"], r["overrides"]["optim.lr"]) for r in found["rows"]}
    assert got == {(a, lr) for a in (1, 2, 3) for lr in (0.01, 0.1)}
    assert found["trials"] == found["complete"] == 6


def test_equal_settings_share_a_run_and_failures_are_counted(place):
    place.search("trials=8, sampler='random', parallel=2", 'choice("optim.lr", [0.01, 0.1])')
    engine = Fake()
    (found,) = place.run("shared", engine, workers=2)["searches"]
    assert found["complete"] == 8
    assert len(engine.begun) == 2

    class Mistaken(Fake):
        def run(self, child, asked):
            if child.overrides["optim.lr"] > 0.05:
                return process.Outcome(process.MISTAKE, "too large")
            return super().run(child, asked)

    (found,) = place.run("failing", Mistaken())["searches"]
    assert found["complete"] + found["fail"] == 8
    assert found["fail"] > 0


def test_several_experiments_get_their_trials_each_beside_a_plain_list(place, tmp_path):
    (tmp_path / "other.py").write_text("def get_config(arg=None):\n    return {1: 1}\n")
    place.search("trials=3, sampler='random'")
    text = (tmp_path / "s.py").read_text().rstrip().removesuffix("]")
    text += f', search("other.py", [{SPACE}], trials=3, fixed={{"a": 1}})'
    text += ', ("tiny.py", {"optim.lr": 0.5})]\n'
    (tmp_path / "s.py").write_text(text)
    record = place.run("both", workers=2)
    assert [(s["experiment"], s["trials"], s["complete"]) for s in record["searches"]] == [
        ("tiny.py", 3, 3),
        ("other.py", 3, 3),
    ]
    assert all(r["overrides"]["a"] == 1 for r in record["searches"][1]["rows"])
    assert len(record["children"]) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(space=[]), "space: nothing to search"),
        (dict(sampler="tbe"), "sampler: 'tbe' is not one of tpe, cma, random, grid"),
        (dict(pruner="hyper"), "pruner: 'hyper' is not one of none, asha, median"),
        (dict(trials=0), "trials: 0 is below 1"),
        (dict(fixed={"lr": 1}), "lr: set twice"),
        (dict(sampler="grid"), "sampler: 'grid' takes choices, and 'lr' is a range"),
        (dict(sampler="cma"), "sampler: 'cma' takes two or more numbers, and there is 1"),
    ],
)
def test_mistakes_in_a_search(arguments, message):
    with pytest.raises(ValueError, match=message):
        combinators.search("e", **({"space": [uniform("lr", 0, 1)], "trials": 3} | arguments))


def test_mistakes_in_a_range():
    for make, message in (
        (lambda: uniform("k", 2, 1), "k: low 2 is not below high 1"),
        (lambda: log_uniform("k", 0, 1), "k: a logarithmic range begins above 0, not at 0"),
        (lambda: integers("k", 1, 9, step=-1), "k: step is -1, below 1"),
        (lambda: choice("k", []), "k: a choice of no values"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert param("k", [1]) == [{"k": 1}]


def test_without_optuna_one_line(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    place.search("trials=2")
    with pytest.raises(
        ValueError, match=r"search\(\.\.\.\) needs the package 'optuna' .*\[sweep\]"
    ):
        place.run("none")
