"""A disk that fills up while a run writes its numbers: one line, all closed, a true record."""

import errno
import json

import pytest

from sparse_pretrain import config
from sparse_pretrain.commands import errors
from sparse_pretrain.training import loop, metrics, record

LOG = config.LogConfig(sinks=("jsonl", "tensorboard"))
RUN = {"name": "tiny", "config": {}}


@pytest.fixture
def full():
    """A file that every write to finds full."""
    with open("/dev/full", "ab", buffering=0) as file:
        yield file


class Service:
    """A sink that remembers whether it was closed, and may fail to."""

    made: list["Service"]

    def __init__(self, *unused):
        self.closed = False
        self.made.append(self)

    def write(self, step, scalars):
        pass

    def close(self):
        self.closed = True
        raise ConnectionError("gone")


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(Service, "made", [], raising=False)
    monkeypatch.setitem(metrics.SINKS, "tensorboard", Service)
    return Service


def test_the_error_names_the_file_and_every_sink_is_closed(tmp_path, full, service):
    writer = metrics.Writer(tmp_path, LOG, RUN)
    writer.eval(1, {"bits_per_byte": 2.0})
    files = dict(writer._jsonl._files)
    writer._jsonl._files["metrics"] = full
    with pytest.raises(OSError, match="No space left on device") as caught:
        writer.train(1, {"loss": 2.0})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.warns(UserWarning, match="tensorboard stopped"):  # and no second error of the row
        writer.close()
    assert [s.closed for s in service.made] == [True]
    assert all(file.closed for file in files.values())
    assert json.loads((tmp_path / "eval.jsonl").read_text())["step"] == 1
    writer.close()


def test_a_warning_that_is_an_error_leaves_nothing_open(tmp_path, service):
    writer = metrics.Writer(tmp_path, LOG, RUN)
    with pytest.raises(UserWarning, match="tensorboard stopped"):
        writer.close()
    assert all(file.closed for file in writer._jsonl._files.values())


def test_services_are_closed_when_the_files_cannot_be_opened(tmp_path, service):
    (tmp_path / "eval.jsonl").mkdir()
    with (
        pytest.warns(UserWarning, match="tensorboard stopped"),
        pytest.raises(IsADirectoryError),
    ):
        metrics.Writer(tmp_path, LOG, RUN)
    assert [s.closed for s in service.made] == [True]


def test_a_record_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    record.write_json(path, {"a": 1})

    def fail(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        record.write_json(path, {"a": 2})
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("room", [True, False])
def test_a_run_says_failed_where_there_is_room_to(room, tmp_path, full, monkeypatch):
    """Without a training step: its first row is what the disk has no room for."""
    written = []

    def write(path, content):
        if content["status"] != "running" and not room:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append((content["status"], content.get("error")))

    monkeypatch.setattr(record, "write_json", write)

    def run(self):
        self.record.open()
        self.begun = True
        with metrics.Writer(self.workdir, config.LogConfig(), RUN) as writer:
            files.update(writer._jsonl._files)
            writer._jsonl._files["metrics"] = full
            writer.train(1, {"loss": 2.0})

    files: dict = {}
    monkeypatch.setattr(loop.Trainer, "_run", run)
    values = {
        "name": "tiny",
        "steps": 2,
        "data": {"source": "synthetic:copy", "seq": 64, "batch": 2},
        "model": {"width": 8, "blocks": {"b": {}}, "pattern": ["b"], "repeats": 1},
        "optim": {"kind": "adamw"},
    }
    with pytest.raises(OSError, match="No space left") as caught:
        loop.train(config.from_config_dict(values), tmp_path, [], quiet=True)
    code, line = errors.describe(caught.value)
    assert code == errors.FAILED
    path = tmp_path / "metrics.jsonl"
    assert f"the disk is full ([Errno 28] No space left on device: '{path}')" in line
    assert "\n" not in line
    assert all(file.closed for file in files.values())
    assert [status for status, _ in written] == ["running"] + ["failed"] * room
    if room:
        assert "metrics.jsonl" in written[-1][1]
