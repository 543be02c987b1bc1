"""Rows on disk, resuming, and the calls that each service gets."""

import inspect
import io
import json
import math
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
from rich.console import Console

from sparse_pretrain.training import metrics, progress


class LogConfig(NamedTuple):
    """What the writer reads of a configuration, without the import of every section of it."""

    every: int = 1
    sinks: tuple[str, ...] = ("jsonl",)


RUN = {
    "name": "quickstart",
    "config": {"steps": 4, "optim": {"lr": 1e-3, "betas": [0.9, 0.95]}},
}


def lines(path):
    def refuse(text):
        raise AssertionError(f"not JSON: {text}")

    return [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]


def fill(writer, first, last):
    for step in range(first, last + 1):
        writer.train(step, {"loss": 10.0 / step, "tokens": 64 * step})


def test_non_finite_and_arrays_are_strict_json(tmp_path):
    row = {"loss": float("nan"), "peak": float("inf"), "x": np.float32(1.5), "n": np.int64(3)}
    with metrics.Writer(tmp_path, LogConfig(), RUN) as writer:
        writer.train(1, row | {"load": np.array([1.0, -math.inf]), "name": "µ"})
        writer.moe(1, {"load": np.eye(2, dtype=np.float32), "max_vio": np.zeros(1)})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "peak": None, "x": 1.5, "n": 3, "load": [1.0, None], "name": "µ"}
    ]
    moe = {"step": 1, "load": [[1.0, 0.0], [0.0, 1.0]], "max_vio": [0.0]}
    assert lines(tmp_path / "moe.jsonl") == [moe]


def test_rows_are_on_disk_before_close(tmp_path):
    writer = metrics.Writer(tmp_path, LogConfig(), RUN)
    writer.train(1, {"loss": 2.0})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    writer.close()


def test_resume_leaves_one_row_per_step(tmp_path):
    with metrics.Writer(tmp_path, LogConfig(), RUN) as writer:
        fill(writer, 1, 7)
        writer.eval(4, {"bits_per_byte": 2.0})
        writer.eval(6, {"bits_per_byte": 1.9})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "lo')  # what a power cut leaves
    with metrics.Writer(tmp_path, LogConfig(), RUN, step=4) as writer:
        writer.eval(4, {"bits_per_byte": 2.0})  # evaluated before and after the interruption
        fill(writer, 5, 9)
    rows = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 10))
    assert [r["tokens"] for r in rows] == [64 * s for s in range(1, 10)]
    assert [r["step"] for r in lines(tmp_path / "eval.jsonl")] == [4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "eval.jsonl",
        "metrics.jsonl",
        "moe.jsonl",
    ]


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_truncate_survives_any_cut(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in (10, 11, 12))
    path.write_text(whole[: len(whole) - cut])
    complete = whole[: len(whole) - cut].count("\n")
    last = metrics.truncate(path, 11)
    assert [r["step"] for r in lines(path)] == [10, 11][:complete]
    assert last == ([10, 11][:complete] or [None])[-1]
    assert metrics.truncate(tmp_path / "absent.jsonl", 3) is None


def test_steps_never_run_backwards(tmp_path):
    with metrics.Writer(tmp_path, LogConfig(), RUN) as writer:
        fill(writer, 1, 3)
        with pytest.raises(AssertionError, match="step 2 after step 3"):
            writer.train(2, {"loss": 1.0})


def test_every_sink_can_be_configured():
    from sparse_pretrain import config

    assert config.LogConfig() == config.LogConfig(**LogConfig()._asdict())
    assert config.SINKS == tuple(metrics.SINKS)


@pytest.mark.parametrize(
    ("sink", "package"),
    [
        ("tensorboard", "tensorboardX"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
        ("trackio", "trackio"),
    ],
)
def test_missing_package_names_the_extra_and_touches_nothing(tmp_path, monkeypatch, sink, package):
    monkeypatch.setitem(sys.modules, package, None)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(ValueError, match=rf"sparse-pretrain\[{sink}\]") as caught:
        metrics.Writer(workdir, LogConfig(sinks=(sink,)), RUN)
    assert "\n" not in str(caught.value)
    assert (workdir / "metrics.jsonl").read_text() == '{"step": 9}\n'


def events(folder):
    """What TensorBoard reads in a folder: files by name, the events of each in order."""
    from tensorboardX.proto import event_pb2

    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8), its crc (4), the event, its crc (4)
            size = int.from_bytes(data[at : at + 8], "little")
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_tensorboard_holds_the_numbers(tmp_path):
    config = LogConfig(every=2, sinks=("tensorboard",))
    with metrics.Writer(tmp_path, config, RUN) as writer:
        fill(writer, 1, 5)
        writer.eval(4, {"bits_per_byte": 2.25, "per_domain": {"net": {"bits_per_byte": 2.5}}})
    read = events(tmp_path / "tensorboard")
    got = [(e.step, v.tag, v.simple_value) for e in read for v in e.summary.value]
    assert (2, "train/loss", 5.0) in got
    assert (4, "train/loss", 2.5) in got
    assert (4, "eval/bits_per_byte", 2.25) in got
    assert (4, "eval/per_domain/net/bits_per_byte", 2.5) in got
    assert {step for step, tag, _ in got if tag == "train/loss"} == {2, 4}
    # the file keeps every step all the same
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    """TensorBoard's rule: a session's start drops what was read of its step and later ones."""
    from tensorboardX.proto import event_pb2

    config = LogConfig(sinks=("tensorboard",))
    for session, (resumed, last) in enumerate([(0, 3), (0, 7), (4, 6), (6, 9)]):
        with metrics.Writer(tmp_path, config, RUN, step=resumed) as writer:
            for step in range(resumed + 1, last + 1):
                writer.train(step, {"session": session})
        # a file is named after the second it was opened in, and these are of the same second
        (path,) = (tmp_path / "tensorboard").glob("events.out.*")
        path.rename(path.with_name(f"events.{session}"))
    shown = []
    for event in events(tmp_path / "tensorboard"):
        if event.session_log.status == event_pb2.SessionLog.START:
            shown = [row for row in shown if row[0] < event.step]
        shown += [(event.step, v.simple_value) for v in event.summary.value]
    expected = [1] * 4 + [2] * 2 + [3] * 3  # the session that wrote each step's last row
    assert shown == list(enumerate(map(float, expected), 1))


# The parameters of the real functions (wandb 0.31, mlflow 3.17, trackio 0.43), in their order,
# as far as this project may use them; a call with any other name fails to bind.
SIGNATURES = {
    "wandb.init": "entity project dir id name notes tags config group job_type mode resume",
    "run.log": "data step commit",
    "run.define_metric": "name step_metric step_sync hidden summary overwrite",
    "run.finish": "exit_code",
    "mlflow.set_experiment": "experiment_name experiment_id",
    "mlflow.start_run": "run_id experiment_id run_name nested parent_run_id tags description",
    "mlflow.log_params": "params synchronous run_id",
    "mlflow.log_metrics": "metrics step synchronous run_id timestamp model_id dataset",
    "mlflow.end_run": "status",
    "trackio.init": "project name group space_id server_url dataset_id bucket_id config resume",
    "trackio.log": "metrics step",
    "trackio.finish": "",
}


class Recorder:
    """Functions that check their arguments against SIGNATURES and remember each call."""

    def __init__(self):
        self.calls = []

    def function(self, name, result=None, broken=False):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = SIGNATURES[name].split()
        signature = inspect.Signature([inspect.Parameter(n, kind, default=None) for n in names])

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            self.calls.append((name, dict(bound.arguments)))
            if broken:
                raise ConnectionError("no route\nto host")
            return result

        return call

    def of(self, name):
        return [arguments for n, arguments in self.calls if n == name]

    def install(self, monkeypatch, package, result=None, broken=()):
        module = types.ModuleType(package)
        for name in SIGNATURES:
            owner, function = name.split(".")
            if owner == package:
                fake = self.function(name, result, broken=name in broken)
                setattr(module, function, fake)
        monkeypatch.setitem(sys.modules, package, module)


@pytest.fixture
def recorder():
    return Recorder()


def test_wandb_calls(tmp_path, monkeypatch, recorder):
    names = ("log", "define_metric", "finish")
    run = types.SimpleNamespace(**{n: recorder.function(f"run.{n}") for n in names})
    recorder.install(monkeypatch, "wandb", run)
    for step in (0, 2):
        with metrics.Writer(tmp_path, LogConfig(sinks=("wandb",)), RUN, step=step) as writer:
            writer.train(step + 1, {"loss": 2.5, "peak": float("nan")})
    first, again = recorder.of("wandb.init")
    with metrics.Writer(tmp_path, LogConfig(sinks=("wandb",)), RUN):
        pass
    assert recorder.of("wandb.init")[-1]["id"] != first["id"]  # started over, not resumed
    assert first == again  # the id is the same, so the service continues one run
    assert first["name"] == "quickstart"
    assert first["config"] == RUN["config"]
    assert first["resume"] == "allow"
    assert {"name": "*", "step_metric": "step"} in recorder.of("run.define_metric")
    logged = [c["data"] for c in recorder.of("run.log")]
    assert logged == [{"step": 1, "train/loss": 2.5}, {"step": 3, "train/loss": 2.5}]
    assert len(recorder.of("run.finish")) == 3


def test_mlflow_calls(tmp_path, monkeypatch, recorder):
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    recorder.install(monkeypatch, "mlflow", run)
    long = RUN | {"config": RUN["config"] | {f"k{i}": i for i in range(150)}}
    for step in (0, 2):
        with metrics.Writer(tmp_path, LogConfig(sinks=("mlflow",)), long, step=step) as writer:
            writer.eval(step + 1, {"bits_per_byte": 2.0})
    assert recorder.of("mlflow.start_run") == [{"run_name": "quickstart"}, {"run_id": "abc"}]
    sent = [c["params"] for c in recorder.of("mlflow.log_params")]
    assert [len(p) for p in sent] == [100, 53]
    assert sent[0]["optim.lr"] == "0.001"
    assert recorder.of("mlflow.log_metrics") == [
        {"metrics": {"eval/bits_per_byte": 2.0}, "step": 1},
        {"metrics": {"eval/bits_per_byte": 2.0}, "step": 3},
    ]
    assert len(recorder.of("mlflow.end_run")) == 2


def test_trackio_calls(tmp_path, monkeypatch, recorder):
    recorder.install(monkeypatch, "trackio")
    for step in (0, 2):
        config = LogConfig(sinks=("trackio",))
        with metrics.Writer(tmp_path, config, RUN, step=step) as writer:
            writer.moe(step + 1, {"max_vio": [0.5, 0.25], "load": [[1, 1], [2, 0]]})
    first, again = recorder.of("trackio.init")
    assert (first["resume"], again["resume"]) == ("never", "allow")
    assert first["name"] == again["name"]
    assert recorder.of("trackio.log")[0] == {
        "metrics": {"moe/max_vio/0": 0.5, "moe/max_vio/1": 0.25},
        "step": 1,
    }
    assert len(recorder.of("trackio.finish")) == 2


def test_a_service_that_cannot_start_is_one_line(tmp_path, monkeypatch, recorder):
    recorder.install(monkeypatch, "trackio", broken=("trackio.init",))
    with pytest.raises(ValueError, match=r"'trackio' could not start: no route$"):
        metrics.Writer(tmp_path, LogConfig(sinks=("trackio",)), RUN)


def test_a_service_that_goes_away_does_not_stop_the_run(tmp_path, monkeypatch, recorder):
    recorder.install(monkeypatch, "trackio", broken=("trackio.log",))
    with metrics.Writer(tmp_path, LogConfig(sinks=("trackio",)), RUN) as writer:
        with pytest.warns(UserWarning, match="trackio stopped"):
            fill(writer, 1, 3)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(recorder.of("trackio.log")) == 1


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=120)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (999, "999"),
        (999.9, "1k"),
        (1234, "1.23k"),
        (5e6, "5M"),
        (7.1e9, "7.1G"),
        (2.5e15, "2.5P"),
        (3.14e23, "314Z"),
        (None, "-"),
        (math.nan, "-"),
    ],
)
def test_si(value, text):
    assert progress.si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3725, "1:02:05"), (None, "-:--")]
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


def test_plain_lines_come_rarely_and_the_last_always(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = plain_console()
    with progress.Bar(20, console=console, seconds=5.0) as bar:
        for step in range(1, 21):
            now[0] += 1.0
            bar.update(step, {"loss": 3.0, "bits_per_byte": 2.0, "tokens_per_second": 12345.0})
            if step == 11:
                assert bar.eta() == pytest.approx(9.0)
    said = console.file.getvalue().splitlines()
    assert [int(x.split("/")[0]) for x in said] == [1, 6, 11, 16, 20]
    assert said[2] == "11/20  loss 3.0000  2.000 bits/byte  12.3k tok/s  ETA 0:09"


def test_interrupted_run_shows_its_last_step():
    console = plain_console()
    with progress.Bar(20, console=console, start=4) as bar:
        for step in (5, 6, 7):
            bar.update(step, {"loss": float("nan"), "mfu": 0.123})
    said = console.file.getvalue().splitlines()
    assert said[-1].startswith("7/20  loss not finite  MFU 12.3%")
    assert len(said) == 2


def test_bar_on_a_terminal_shows_everything():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress.Bar(8, console=console) as bar:
        bar.note("[note] kept as it is")
        bar.update(8, {"loss": 1.25, "tokens_per_second": 1e4, "mfu": 0.5})
    text = console.file.getvalue()
    assert "[note] kept as it is" in text
    assert "8/8" in text
    assert "loss 1.2500" in text
    assert "MFU 50.0%" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_status_says_what_it_waits_for(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with progress.status("preparing [corpus]", console):
        pass
    assert "preparing [corpus]" in console.file.getvalue()
