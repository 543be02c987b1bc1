"""Ctrl-C: one line, exit status 130, and before the first step nothing half-written."""

import json
import os
import subprocess
import sys

import pytest

from tests.data.conftest import lines

EXPERIMENT = """
def get_config():
    return dict(
        name="tiny",
        steps=4,
        data=dict(source="text_folder:texts", tokenizer="bpe:300", seq=16, batch=2),
        model=dict(width=16, blocks=dict(block=dict()), repeats=1),
        optim=dict(kind="adamw"),
    )
"""
# The signal comes at the end of a function, if wanted within a collection of garbage, where Python
# reports errors and goes on.
PROGRAM = """
import functools, gc, importlib, os, sys
module, path = sys.argv[1].split(":")
*parents, name = path.split(".")
owner = functools.reduce(getattr, parents, importlib.import_module(module))
real = getattr(owner, name)

def interrupted(*args, **kwargs):
    result = real(*args, **kwargs)
    if sys.argv[2] == "collecting":
        gc.callbacks.append(kill)
        gc.collect()
    else:
        kill()
    return result

def kill(*unused):
    if kill in gc.callbacks:
        gc.callbacks.remove(kill)
    os.kill(os.getpid(), 15 if sys.argv[2] == "politely" else 2)
    if sys.argv[2] == "twice":
        os.kill(os.getpid(), 2)

setattr(owner, name, interrupted)
from sparse_pretrain import cli
sys.exit(cli.main(sys.argv[3:]))
"""


def interrupted(place, how, folder, *options):
    """The process of `train` that the signal ended, by its exit status 130."""
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / "texts" / f"{i}.txt").write_text(lines(i))
    (folder / "tiny.py").write_text(EXPERIMENT)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "SPARSE_PRETRAIN_CACHE": str(folder / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", PROGRAM, place, how, "train", "--config=tiny.py", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stdout
    return done


@pytest.mark.parametrize(
    ("place", "how"),
    [
        pytest.param("sparse_pretrain.data.corpus:_count", "collecting", marks=pytest.mark.slow),
        ("sparse_pretrain.data.store:_write", "politely"),
        ("jax.stages:Lowered.compile", "at once"),
    ],
)
def test_ctrl_c_before_the_first_step(place, how, tmp_path):
    done = interrupted(place, how, tmp_path)
    said = done.stderr.splitlines()
    assert said[-1:] == ["interrupted; the same command starts again"]
    assert all(line.startswith("prepared text_folder") for line in said[:-1]), said
    left = [p for folder in (tmp_path / "cache", tmp_path / "runs") for p in folder.rglob("*")]
    assert not [p for p in left if p.name.startswith((".building", ".text")) or ".tmp" in p.name]
    assert not [p for p in left if p.parent.name == "tokens" and p.name.startswith(".")]
    run = tmp_path / "runs" / "tiny"
    assert not (run / "checkpoints").exists()
    if (run / "run.json").exists():
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
        assert (run / "metrics.jsonl").read_text() == ""
    assert (run / "run.json").exists() or how != "at once"


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_a_checkpoint_that_is_being_written(tmp_path):
    """One line more, and none of the threads that write it."""
    options = ["--quiet", "--config.checkpoint.every=1"]
    place = "sparse_pretrain.checkpoint.checkpointer:Checkpointer.save"
    done = interrupted(place, "twice", tmp_path, *options)
    said = [line for line in done.stderr.splitlines() if not line.startswith("prepared ")]
    assert [line.partition(";")[0] for line in said] == ["stopping after this step", "interrupted"]
    record = json.loads((tmp_path / "runs/tiny/run.json").read_text())
    assert record["status"] == "interrupted"
