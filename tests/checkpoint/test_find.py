"""Which checkpoint a word means, and what is said when it is not there."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from sparse_pretrain import checkpoint


def _run(workdir, scores):
    """A checkpoint per step, with the held-out bits/byte it was saved with."""
    with checkpoint.Checkpointer(workdir, keep=9) as saver:
        for step, score in scores.items():
            metrics = None if score is None else {"bits_per_byte": score}
            state = {"params": {"w": jnp.full((2,), float(step))}, "router": {}}
            saver.save(step, state, cursor={}, config={}, metrics=metrics)
    return saver


def test_last_best_and_a_step(tmp_path):
    saver = _run(tmp_path, {2: None, 4: 1.5, 6: 1.75})
    assert [saver.find(which) for which in ("last", "best", "2", "0004")] == [6, 4, 2, 4]
    for which in ("3", "first", "", "-2", "2.0"):
        with pytest.raises(checkpoint.CheckpointError, match=r"steps there are 2, 4, 6") as e:
            saver.find(which)
        assert repr(which) in str(e.value)


def test_nothing_scored_and_nothing_there(tmp_path):
    saver = _run(tmp_path / "a", {2: None})
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint was scored; .* are 2"):
        saver.find("best")
    with pytest.raises(checkpoint.CheckpointError, match="b/checkpoints: no checkpoint here yet"):
        checkpoint.Checkpointer(tmp_path / "b").find("last")


def test_a_workdir_may_name_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run@home").mkdir()
    assert checkpoint.parse("runs/a") == (Path("runs/a"), "last")
    assert checkpoint.parse("runs/a@best") == (Path("runs/a"), "best")
    assert checkpoint.parse("run@home") == (Path("run@home"), "last")
    assert checkpoint.parse("run@home@40") == (Path("run@home"), "40")
    assert checkpoint.parse("~/a@40") == (Path("~/a").expanduser(), "40")
