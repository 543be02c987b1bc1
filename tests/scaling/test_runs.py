"""The table of runs: order, states and differences."""

import csv
import io
import json
import os
import platform
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sparse_pretrain.scaling import export, runs


def console():
    return Console(file=io.StringIO(), force_terminal=False, width=140)


@pytest.fixture
def root(tmp_path, fake_run):
    fake_run.write(tmp_path / "good", steps=60, bits=2.1)
    fake_run.write(tmp_path / "group/better", steps=60, bits=1.9)
    fake_run.write(tmp_path / "group/cut", steps=60, done=30, status="interrupted")
    fake_run.write(tmp_path / "bad", steps=60, done=7, status="failed", error="x\nloss is nan")
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable/run.json").write_text('{"name": ')
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial/metrics.jsonl").write_text('{"step": 4, "loss": 3.0}\n{"st')
    (tmp_path / "not a run/checkpoints").mkdir(parents=True)
    return tmp_path


def by_folder(rows):
    return {os.path.basename(r["workdir"]): r for r in rows}


def test_every_state_has_its_row(root):
    rows = by_folder(runs.list_runs(root))
    assert {k: r["status"] for k, r in rows.items()} == {
        "good": "finished",
        "better": "finished",
        "cut": "interrupted",
        "bad": "failed",
        "unreadable": "failed",
        "partial": "failed",
    }
    assert rows["bad"]["cause"] == "loss is nan"
    assert rows["unreadable"]["cause"] == "run.json is unreadable"
    assert rows["partial"]["cause"] == "run.json is missing"
    assert (rows["partial"]["step"], rows["partial"]["loss"]) == (4, 3.0)
    assert (rows["cut"]["step"], rows["cut"]["steps"]) == (30, 60)
    assert rows["good"]["bits_per_byte"] == pytest.approx(2.1)
    assert rows["good"]["source"] == "python_stdlib"


def test_sorted_by_any_column_with_unknown_last(root):
    best = [os.path.basename(r["workdir"]) for r in runs.list_runs(root)]
    assert best[:2] == ["better", "good"]
    assert {best[-1], best[-2]} == {"unreadable", "partial"}
    steps = [r["step"] for r in runs.list_runs(root, sort="step")]
    assert steps == [4, 7, 30, 60, 60, None]
    for column in runs.list_runs(root)[0].keys() - {"config"}:
        assert len(runs.list_runs(root, sort=column)) == 6
    with pytest.raises(ValueError, match="sort: 'bits' is not one of name, workdir"):
        runs.list_runs(root, sort="bits")
    with pytest.raises(ValueError, match="is not a folder"):
        runs.list_runs(root / "absent")


def test_mixed_types_in_a_column_still_sort(tmp_path, fake_run):
    fake_run.write(tmp_path / "a", steps=20, commit=12)
    fake_run.write(tmp_path / "b", steps=20, commit="abc")
    fake_run.write(tmp_path / "c", steps=20, commit=None)
    got = runs.list_runs(tmp_path, sort="commit")
    assert [r["commit"] for r in got] == [12, "abc", None]


def test_table_and_json(root):
    out = console()
    rows = runs.list_runs(root)
    runs.print_runs(rows, console=out)
    text = out.file.getvalue().splitlines()
    assert text[1].split()[:3] == ["better", "(quickstart)", "finished"]
    assert "1.9000" in text[1]
    assert any("30/60" in line for line in text)
    assert f"{root / 'bad'}: loss is nan" in text
    assert f"{root / 'unreadable'}: run.json is unreadable" in text
    out = console()
    runs.print_runs(rows, as_json=True, console=out)
    assert json.loads(out.file.getvalue()) == json.loads(json.dumps(rows))
    out = console()
    runs.print_runs([], console=out)
    assert out.file.getvalue() == "no runs here\n"


def test_a_pipe_folds_no_column(tmp_path, fake_run, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    for lr in (1, 2):
        name = f"a_rather_long_name_of_a_sweep_s_run_{lr}"
        fake_run.write(tmp_path / name, config={"optim": {"kind": "muon", "learning_rate": lr}})
    runs.print_runs(runs.list_runs(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # heads and a line a run
    assert all("optim.learning_rate=" in line for line in lines[1:])


def test_files_have_a_row_a_run_and_a_column_a_difference(tmp_path, fake_run):
    for name, lr in (("a", 0.002), ("b", 0.004)):
        config = {"optim": fake_run.CONFIG["optim"] | {"lr": lr}}
        fake_run.write(tmp_path / name, steps=20, config=config, bits=lr)
    launches = [{"seconds": 900.0}, {"seconds": 450.0}]
    device = {"kind": "cpu", "cpu": "Fast 9000", "count": 2}
    more = {"status": "interrupted", "launches": launches, "device": device}
    fake_run.write(tmp_path / "c", steps=20, done=10, layers=2, **more)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/run.json").write_text("{")
    rows = runs.list_runs(tmp_path, price=4.0)
    export.write_csv(rows, tmp_path / "t.csv")
    export.write_parquet(rows, tmp_path / "t.parquet")
    with open(tmp_path / "t.csv", newline="") as file:
        table = {os.path.basename(r["workdir"]): r for r in csv.DictReader(file)}
    assert sorted(table) == ["a", "b", "c", "d"]
    assert [table[k]["config.optim.lr"] for k in "abcd"] == ["0.002", "0.004", "0.002", ""]
    assert "config.model.width" not in table["a"]  # all agree on it
    a, c = table["a"], table["c"]
    tokens = 20 * 32 * 256
    assert float(a["loss"]) == float(a["nats_per_token"]) == pytest.approx(0.002 * 1.6)
    assert float(a["flops"]) == tokens * 3.1e7 == float(a["params"]) * 6 * tokens
    assert float(a["chip_hours"]) == 161.25 / 3600
    # what did not finish counts as far as it got
    assert (c["device"], c["chips"], c["status"]) == ("Fast 9000", "2", "interrupted")
    assert float(c["chip_hours"]) == 2 * 1350 / 3600
    assert float(c["cost"]) == 4 * 2 * 1350 / 3600
    assert float(c["flops"]) == 10 * 32 * 256 * 3.1e7
    assert table["d"]["cause"] == "run.json is unreadable"
    parquet = pytest.importorskip("pyarrow.parquet", reason="extra 'parquet': pyarrow is missing")
    kept = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    for row in kept:
        text = {k: "" if v is None else str(v) for k, v in row.items()}
        assert text == table[os.path.basename(row["workdir"])]
    out = console()
    runs.print_runs(rows, console=out)
    assert "optim.lr=0.004" in out.file.getvalue()
    assert "3.00" in out.file.getvalue()  # the cost of c


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"--parquet needs the package 'pyarrow' .*\[parquet\]"):
        export.write_parquet([], tmp_path / "t.parquet")


def test_table_warns_of_two_corpora(tmp_path, fake_run):
    fake_run.write(tmp_path / "a", steps=20)
    fake_run.write(tmp_path / "b", steps=20, manifest_hash="f" * 16)
    out = console()
    runs.print_runs(runs.list_runs(tmp_path), console=out)
    assert "different corpora" in out.file.getvalue()


def test_running_means_a_living_process(tmp_path, fake_run):
    here = platform.node()
    fake_run.write(tmp_path / "mine", steps=20, status="running", pid=os.getpid(), host=here)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    fake_run.write(tmp_path / "gone", steps=20, status="running", pid=gone.pid, host=here)
    fake_run.write(tmp_path / "young", steps=20, status="running", pid=1, host="elsewhere")
    fake_run.write(tmp_path / "old", steps=20, status="running")
    for path in (tmp_path / "old").iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    states = {k: r["status"] for k, r in by_folder(runs.list_runs(tmp_path)).items()}
    assert states == {
        "mine": "running",
        "gone": "interrupted",
        "young": "running",
        "old": "interrupted",
    }


def test_diff_names_keys_and_both_values(tmp_path, fake_run):
    a = fake_run.write(tmp_path / "a", steps=60, bits=2.0)
    ffn = fake_run.CONFIG["model"] | {"ffn": {"kind": "dense"}, "tie": True}
    config = {"optim": fake_run.CONFIG["optim"] | {"lr": 0.004}, "model": ffn}
    b = fake_run.write(tmp_path / "b", steps=60, bits=1.9, config=config)
    found = runs.diff(tmp_path / "a", tmp_path / "b")
    assert found["config"] == [
        ("model.ffn.experts", 16, None),
        ("model.ffn.kind", "moe", "dense"),
        ("model.ffn.router.kind", "sigmoid_bias", None),
        ("model.ffn.router.rate", 1e-3, None),
        ("model.tie", None, True),
        ("optim.lr", 0.002, 0.004),
    ]
    results = {k: (x, y) for k, x, y in found["results"]}
    want = (a["summary"]["bits_per_byte"], b["summary"]["bits_per_byte"])
    assert results["bits_per_byte"] == want
    assert "tokens" not in results
    assert found["comparable"]
    out = console()
    runs.print_diff(found, console=out)
    text = out.file.getvalue()
    assert "optim.lr" in text
    assert "-5.00 %" in text


def test_diff_of_equal_and_of_incomparable_runs(tmp_path, fake_run):
    for name in "ab":
        fake_run.write(tmp_path / name, steps=20)
    fake_run.write(tmp_path / "c", steps=20, manifest_hash="f" * 16)
    same = runs.diff(tmp_path / "a", tmp_path / "b")
    assert (same["config"], same["results"]) == ([], [])
    out = console()
    runs.print_diff(same, console=out)
    assert "config: no difference" in out.file.getvalue()
    other = runs.diff(tmp_path / "a", tmp_path / "c")
    assert not other["comparable"]
    assert other["results"] == [("manifest_hash", "0123456789abcdef", "f" * 16)]
    out = console()
    runs.print_diff(other, as_json=True, console=out)
    assert json.loads(out.file.getvalue())["results"][0][0] == "manifest_hash"
    with pytest.raises(ValueError, match=r"^runs diff: .*absent holds no run"):
        runs.diff(tmp_path / "a", tmp_path / "absent")
