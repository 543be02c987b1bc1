"""The loop: resuming changes nothing to the bit, a broken loss stops it, its files are whole."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparse_pretrain import checkpoint, config, data
from sparse_pretrain.commands import errors
from sparse_pretrain.report import workdir as workdirs
from sparse_pretrain.training import loop, record, recovery, run, state, trained
from sparse_pretrain.training import step as steps

STEPS = 12


def experiment(folder, **changes) -> config.Experiment:
    """A small mixture of experts on a folder of text; seconds to train."""
    attention = {"kind": "mla", "heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}
    router = {"kind": "sigmoid_bias", "rate": 0.01}
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "router": router}
    values = {
        "name": "tiny",
        "steps": STEPS,
        "data": {"source": f"text_folder:{folder}", "tokenizer": "bytes", "seq": 32, "batch": 4},
        "model": {
            "width": 32,
            "blocks": {"moe": {"attention": attention, "ffn": moe}},
            "pattern": ["moe"],
            "repeats": 2,
        },
        "optim": {"kind": "muon", "lr": 0.01},
        "ema": 0.9,
        "accumulate": 2,
        "checkpoint": {"every": 5},
        "eval": {"tokens": 256},
        "sample": {"tokens": 0},
    }
    return config.from_config_dict(values | changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of two domains of random words."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
    for domain in ("prose", "notes"):
        (folder / domain).mkdir()
        for i in range(8):
            body = "\n".join(" ".join(rng.choice(words, 9)) for _ in range(30))
            (folder / domain / f"{i}.txt").write_text(body)
    return folder


def _train(wanted, workdir, *argv):
    return loop.train(wanted, workdir, list(argv), quiet=True)


def _losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return [(r["loss"], r["grad_norm"], r["max_vio"]) for r in rows]


def _state(wanted, workdir):
    prepared = run.prepare(wanted)
    template = state.create(prepared.definition, prepared.tx, 0, ema=True)
    restored, cursor = checkpoint.Checkpointer(workdir).restore(template)

    def plain(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(plain, restored), cursor


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, _train(experiment(text), workdir)


@pytest.mark.parametrize(
    "stop", [pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 7]
)
def test_an_interrupted_run_equals_one_that_was_not(stop, text, whole, tmp_path, monkeypatch):
    """Losses, parameters, prices, averages, optimizer and cursor, to the bit."""
    with monkeypatch.context() as patch:
        train_step = steps.make_train_step

        def counted(*args, **kwargs):
            return _Stopping(train_step(*args, **kwargs), stop, asked)

        asked: list[int] = []
        patch.setattr(steps, "make_train_step", counted)
        patch.setattr(recovery, "stop_requests", lambda: contextlib.nullcontext(asked))
        with pytest.raises(recovery.Interrupted, match=f"step {stop} of {STEPS}"):
            _train(experiment(text), tmp_path, "first")
    before = json.loads((tmp_path / "run.json").read_text())
    assert before["status"] == "interrupted"
    assert checkpoint.Checkpointer(tmp_path).latest() == stop
    summary = _train(experiment(text), tmp_path, "second")
    _check_launches(before, json.loads((tmp_path / "run.json").read_text()), summary)
    workdir, expected = whole
    assert _losses(tmp_path) == _losses(workdir)
    assert summary["bits_per_byte"] == expected["bits_per_byte"]
    (ours, cursor), (theirs, other) = (_state(experiment(text), w) for w in (tmp_path, workdir))
    assert cursor == other
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def _check_launches(before, after, summary):
    """Both processes are in the record, and the summary's times are those of both."""
    assert after["created"] == before["created"]
    assert (after["argv"], after["commit"]) == (["second"], before["commit"])
    assert [launch["argv"] for launch in after["launches"]] == [["first"], ["second"]]
    assert after["launches"][:1] == before["launches"]
    for launch in after["launches"]:
        assert 0 < launch["compile_seconds"] < launch["seconds"]
    for total, part in (("wall_seconds", "seconds"), ("compile_seconds", "compile_seconds")):
        both = sum(launch[part] for launch in after["launches"])
        assert summary[total] == pytest.approx(both, abs=0.5), total  # the file is written later
        assert summary[total] > before["launches"][0][part], total
    assert summary["goodput"] == summary["train_seconds"] / summary["wall_seconds"]


class _Stopping:
    """A step function that files a stop request when it is called the n-th time."""

    def __init__(self, inner, at, asked):
        self.inner, self.at, self.asked, self.calls = inner, at, asked, 0

    def lower(self, *args):
        return _Stopping(self.inner.lower(*args), self.at, self.asked)

    def compile(self):
        return _Stopping(self.inner.compile(), self.at, self.asked)

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            self.asked.append(2)
        return self.inner(*args)


def test_a_run_leaves_what_it_promises(whole):
    workdir, summary = whole
    for name in ("run.json", "summary.json", "metrics.jsonl", "eval.jsonl", "moe.jsonl"):
        assert (workdir / name).stat().st_size > 0, name
    wanted = {"steps", "tokens", "bits_per_byte", "nats_per_token", "tokens_per_second", "flops"}
    assert wanted | {"compile_seconds", "wall_seconds", "manifest_hash"} <= set(summary)
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * 4 * 32
    assert set(summary["per_domain"]) == {"prose", "notes"}
    assert json.loads((workdir / "run.json").read_text())["status"] == "finished"
    assert checkpoint.Checkpointer(workdir).latest() == STEPS


def test_a_record_from_before_there_were_launches(text, whole, tmp_path, monkeypatch):
    """Its one launch is known by how it was started; a killed process leaves its time so far."""
    stopped_early(whole, tmp_path)
    old = json.loads((tmp_path / "run.json").read_text())
    del old["launches"]
    old |= {"created": "2026-01-01T00:00:00+0000", "argv": ["old"], "commit": "abc"}
    (tmp_path / "run.json").write_text(json.dumps(old))
    written = []
    monkeypatch.setattr(record, "REFRESH", 0.0)
    monkeypatch.setattr(
        record, "write_json", lambda path, x: written.append((path.name, json.dumps(x)))
    )
    _train(experiment(text), tmp_path, "new")
    records = [json.loads(x) for name, x in written if name == "run.json"]
    assert len(records) == 1 + (STEPS - 10) + 1  # at the start, after each step, at the end
    assert {r["created"] for r in records} == {old["created"]}
    first, second = records[-1]["launches"]
    assert first == {"time": old["created"], "argv": ["old"], "commit": "abc"}
    assert second["argv"] == ["new"]
    seconds = [r["launches"][-1]["seconds"] for r in records]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_not_trained_again(text, whole):
    workdir, summary = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    again = _train(experiment(text), workdir)
    assert again["bits_per_byte"] == summary["bits_per_byte"]
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_needs_no_corpus(text, whole, monkeypatch, capsys):
    """An epoch's length and the vocabulary, which only the data knows, are in its record."""
    workdir, summary = whole
    monkeypatch.setattr(data, "load", lambda *args, **kw: pytest.fail("the data was looked at"))
    assert experiment(text).model.vocab == 0
    assert loop.train(experiment(text), workdir, []) == summary
    assert "tiny: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 there, 0.02 here"):
        _train(experiment(text, optim={"kind": "muon", "lr": 0.02}), workdir)
    with pytest.raises(pytest.fail.Exception):  # more steps are work to do
        _train(experiment(text, steps=STEPS + 1), workdir)
    with pytest.raises(pytest.fail.Exception):  # and so is an epoch, which is longer
        _train(experiment(text, steps=0), workdir)


@pytest.mark.parametrize("broken", ["[]", '{"name": "tiny", "conf', "{}", "", '{"config": 3}'])
def test_a_broken_record_is_named(broken, text, tmp_path):
    (tmp_path / "run.json").write_text(broken)
    for use in (lambda: _train(experiment(text), tmp_path), lambda: trained.open_run(tmp_path)):
        with pytest.raises(ValueError, match=r"run\.json: cannot be read \(") as caught:
            use()
        assert errors.describe(caught.value)[0] == errors.MISTAKE
        assert str(caught.value).startswith(f"{tmp_path}/run.json")
        assert "\n" not in str(caught.value)
    assert (tmp_path / "run.json").read_text() == broken
    assert not list(tmp_path.glob("[!r]*"))


def test_evaluations_before_the_last_see_fewer_targets(text, tmp_path):
    """All are also of one set, which the best checkpoint is chosen by."""
    changes = {"eval": {"every": 4, "tokens": 256, "between": 64}, "checkpoint": {"keep": 9}}
    summary = _train(experiment(text, **changes), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [4, 8, STEPS]
    assert rows[0]["heldout_tokens"] == rows[1]["heldout_tokens"] <= 64
    assert rows[-1]["heldout_tokens"] == summary["heldout_tokens"] > 64
    assert rows[-1]["bits_per_byte"] == summary["bits_per_byte"]
    assert "between" not in summary
    curve = workdirs.read(tmp_path).curve
    assert len({r["heldout_tokens"] for r in curve}) == 1
    saver = checkpoint.Checkpointer(tmp_path)
    kept = {s: saver.meta(s)["metrics"]["bits_per_byte"] for s in checkpoint.steps(tmp_path)}
    assert kept == {r["step"]: r["bits_per_byte"] for r in curve}


def test_another_seed_is_refused(text, whole):
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        _train(experiment(text, seed=1), whole[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(text, tmp_path):
    dense = {"attention": {"kind": "full", "heads": 2}, "ffn": {"kind": "dense", "hidden": 16}}
    model = {"width": 16, "blocks": {"dense": dense}, "pattern": ["dense"], "repeats": 1}
    optim = {"kind": "adamw", "lr": 1e30, "clip": 0.0}
    broken = experiment(text, model=model, optim=optim, ema=0.0, accumulate=1)
    with pytest.raises(recovery.RunFailed, match="not both finite; the batch is saved") as caught:
        _train(broken, tmp_path)
    assert "\n" not in str(caught.value)
    (saved,) = tmp_path.glob("nonfinite_step_*.npz")
    assert np.load(saved)["tokens"].shape == (4, 32)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed"
    assert "finite" in record["error"]


@pytest.mark.slow  # by command: tests/cli/test_commands.py
def test_starting_from_another_runs_weights(text, whole, tmp_path):
    workdir, _ = whole
    fresh = _train(dataclasses.replace(experiment(text), steps=3), tmp_path / "a")
    warm = dataclasses.replace(experiment(text), steps=3, init_from=str(workdir))
    started = _train(warm, tmp_path / "b")
    assert started["train_loss"] < fresh["train_loss"]


def stopped_early(whole, workdir):
    """A run that was stopped after its first checkpoint, so without a summary."""
    shutil.copytree(whole[0], workdir, dirs_exist_ok=True)
    shutil.rmtree(checkpoint.folder(workdir) / f"{STEPS:08d}")
    (workdir / "summary.json").unlink()
    return (workdir / "run.json").read_bytes()


def test_what_is_refused_leaves_the_workdir_alone(text, whole, tmp_path):
    """Twice, since a refusal that rewrote run.json would let the same command through."""
    before = stopped_early(whole, tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"optim.lr: 0.01 there, 0.02 here"):
            _train(experiment(text, optim={"kind": "muon", "lr": 0.02}), tmp_path)
        assert (tmp_path / "run.json").read_bytes() == before
        assert not (tmp_path / ".lock").exists()
    (tmp_path / "run.json").unlink()  # the checkpoint knows its config too
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 there"):
        _train(experiment(text, optim={"kind": "muon", "lr": 0.02}), tmp_path)
    assert _train(experiment(text), tmp_path)["steps"] == STEPS


def test_fewer_steps_than_are_done_are_refused(text, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"config.steps: 6 asked for, 12 are done"):
        _train(experiment(text, steps=6), tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


def test_one_process_at_a_time(text, tmp_path):
    body = (
        "import time, pathlib\n"
        "from sparse_pretrain.training import recovery\n"
        f"with recovery.alone(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with recovery.alone(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder" / ".lock").exists()
    assert list((tmp_path / "new").iterdir()) == []  # nothing was written there
    other = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {other.pid} is training in"):
            _train(experiment(text), tmp_path)
        other.kill()
    assert not (tmp_path / "run.json").exists()
    assert _train(experiment(text), tmp_path)["steps"] == STEPS  # a dead process holds nothing


@pytest.mark.slow
def test_weights_of_another_tokenizer_are_refused(text, tmp_path):
    source = tmp_path / "source"
    data = {"source": f"text_folder:{text}", "seq": 32, "batch": 4}
    _train(experiment(text, data={**data, "tokenizer": "bpe:280"}), source)
    start = {"init_from": str(source), "steps": 2}
    other = experiment(text, data={**data, "tokenizer": "bpe:281"}, **start)
    with pytest.raises(ValueError, match=r"config.data.tokenizer: its hash is .*tokenizer=file:"):
        _train(other, tmp_path / "other")
    same = f"file:{source / run.TOKENIZER}"
    right = experiment(text, data={**data, "tokenizer": same}, **start)
    assert _train(right, tmp_path / "right")["steps"] == 2
