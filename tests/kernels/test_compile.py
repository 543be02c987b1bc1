"""The compile command: what it is asked, what it says, and when it fails."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kernels_pallas import compile as command
from kernels_pallas import compiled, device
from kernels_pallas.cases import cases
from kernels_pallas.chips import CHIPS, Chip
from kernels_pallas.device import Target
from kernels_pallas.op import Backend, Op

RECENT = device.jax_version() >= (0, 11)  # Mosaic GPU's kernels need it
ROOT = Path(__file__).resolve().parents[2]


class Here(Chip):
    """This machine's CPU as a target, which needs no other compiler."""

    def devices(self):
        return jax.devices("cpu")


HERE = Here("here", Target("cpu", "cpu"), 1e12, 1e11, 1e10, "")


@pytest.mark.parametrize(("argv", "says"), [
    (["--target", "h300"], "invalid choice: 'h300'"),
    (["--op", "flush"], "op 'flush' is unknown; there are linear, "),
    (["--op", "linear", "--spec", "mla_256"], "spec 'mla_256' is unknown; there are deepseek_v3, "),
    (["--op", "linear", "--backend", "mosaic_gpu"], "'mosaic_gpu' is unknown; there are reference"),
])
def test_wrong_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_missing_compilers_are_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(Chip, "missing", lambda self: f"compiler-of-{self.target.platform}")
    assert command.main(["--target", "h200", "v5p", "--op", "linear"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == ("kernels_pallas.compile: compiler-of-gpu and compiler-of-tpu not installed; "
                   "pip install 'sparse-pretrain[compile]'\n")


def test_the_extra_exists():
    assert "\ncompile = [" in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def here(monkeypatch):
    """The command with this machine as its only target."""
    monkeypatch.setattr(command, "CHIPS", {"here": HERE})
    monkeypatch.setattr(command, "RECORD", Path("no such file"))
    monkeypatch.setattr(Here, "missing", lambda self: None)
    return command.main


def test_a_table_and_json(here, capfd):
    argv = ["--op", "linear", "grouped_matmul", "--spec", "one_row", "nothing"]
    assert here(argv) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[0] == ("1/4, 0 min left at most here linear one_row forward xla: "
                                   "compiled")
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["target", "op", "spec", "direction", "backend", "seconds", "temp",
                                "kernels", "registers", "shared", "spilled", "roofline", "FLOPs"]
    assert here([*argv, "--json"]) == 0
    first, *_, last = json.loads(capfd.readouterr().out)
    # 24 x 40 float32 matrix, a row of each; 2 x 24 x 40 FLOPs at 1e12, bytes at 1e11 a second
    assert first["io_bytes"] == 4 * (24 * 40 + 24 + 40)
    assert first["flops"] == 1920
    assert first["roofline_seconds"] == pytest.approx(4096e-11)
    assert (last["op"], last["direction"], last["backend"]) == ("grouped_matmul", "gradient", "xla")
    assert last["refused"] == {}


def test_rows_are_kept_and_found_again(here, capfd, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    argv = ["--op", "linear", "--spec", "one_row", "prime", "--json", "--keep", str(file)]
    assert here(argv) == 0
    first = capfd.readouterr().out
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 4  # versions and rows
    file.write_text("\n".join(lines[:4]) + "\n")  # as if it had been stopped before the last
    asked = []
    compile_case = command.compile_case
    monkeypatch.setattr(command, "compile_case",
                        lambda *args: asked.append(args[:2]) or compile_case(*args))
    assert here(argv) == 0
    again = json.loads(capfd.readouterr().out)
    assert [(case.spec, direction) for case, direction in asked] == [("prime", "gradient")]
    assert again[:3] == json.loads(first)[:3]
    assert here([*argv, "--kept-only"]) == 0  # three as before, the last compiled anew
    assert len(json.loads(capfd.readouterr().out)) == 4
    assert len(asked) == 1
    # of another source rows are told as such, and of another version none is found, nor compiled
    # if it must not be
    with monkeypatch.context() as at:
        at.setattr(compiled, "sources", lambda root: dict.fromkeys(
            ("", "linear", "mosaic_gpu", "mosaic_tpu"), b"other"))
        assert here([*argv, "--kept-only"]) == 0
        rows = json.loads(capfd.readouterr().out)
        assert [row["earlier"] for row in rows] == ["earlier source"] * 4
        page = compiled.markdown([compiled.Row(**row) for row in rows])
        assert "| here | xla | 4 | 0 | 4 | 0 | 0 | 0 | " in page
    monkeypatch.setattr(compiled, "versions", lambda: {"jax": "0"})
    assert here([*argv, "--kept-only"]) == 0
    assert (json.loads(capfd.readouterr().out), len(asked)) == ([], 1)
    assert here(argv) == 0
    assert len(asked) == 5
    monkeypatch.undo()


def test_a_program_is_compiled_once(here, capfd, tmp_path, monkeypatch):
    first, second = cases(("linear",), ("one_row", "prime"), abstract=True)
    assert first.shapes() != second.shapes()
    twin = dataclasses.replace(first, spec="twin", forward=2.0, gradient=3.0)
    monkeypatch.setattr(command, "cases", lambda *chosen, abstract: [first, second, twin])
    lower, compilations = jax.stages.Lowered.compile, []
    monkeypatch.setattr(jax.stages.Lowered, "compile",
                        lambda self: compilations.append(self) or lower(self))
    file = tmp_path / "rows.jsonl"
    assert here(["--json", "--keep", str(file)]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert len(compilations) == 4  # forward and gradient of two
    one, _, other, _, copy, back = rows
    assert (copy["spec"], copy["same_as"]) == ("twin", "linear one_row forward xla")
    assert back["same_as"] == "linear one_row gradient xla"
    assert (one["same_as"], other["same_as"]) == (None, None)
    assert (copy["flops"], copy["roofline_seconds"]) == (2.0, one["roofline_seconds"])  # by bytes
    assert copy["temp_bytes"] == one["temp_bytes"]
    assert one["program"] == copy["program"] != other["program"]
    page = compiled.markdown([compiled.Row(**row) for row in rows])
    assert "| here | xla | 6 | 2 | 0 | 0 | 0 | 0 | " in page

    # Another source that changes no program: rows are found by it, each as its own.
    monkeypatch.setattr(compiled, "sources", lambda root: dict.fromkeys(
        ("", "linear", "mosaic_gpu", "mosaic_tpu"), b"other"))
    assert here(["--json", "--keep", str(file)]) == 0
    assert json.loads(capfd.readouterr().out) == rows
    # Another chip's compiler is told something else, another version is another compiler.
    for what in ("chip", "version"):
        compilations.clear()
        with monkeypatch.context() as at:
            if what == "chip":
                wide = dataclasses.replace(HERE, bandwidth=2 * HERE.bandwidth)
                at.setattr(command, "CHIPS", {"here": wide})
            else:
                at.setattr(compiled, "versions", lambda: {"jax": "0"})
            assert here(["--json", "--keep", str(file)]) == 0
        capfd.readouterr()
        assert len(compilations) == 4


def test_what_training_runs_is_compiled_first(here, capfd):
    assert here(["--op", "linear", "--json"]) == 0
    out, err = capfd.readouterr()
    specs = [re.search(r"here linear (\S+) ", line)[1] for line in err.splitlines()]
    assert set(specs[:4]) == {"quickstart", "wide"}
    rows = json.loads(out)  # told in the table's order
    assert rows[0]["spec"] == "plain"
    assert {c.spec for c in cases(("flash",), abstract=True) if c.main} >= {"mla_v3_4k", "long_4k"}
    assert not any(c.main for c in cases(("flash",), ("tile_mla", "plain"), abstract=True))


def test_awkward_workloads_go_to_one_chip_of_a_family_first():
    small, main = cases(("linear",), ("quickstart", "one_row"), abstract=True)
    jobs = [(CHIPS[chip], case, "xla") for chip in ("h200", "h100", "v6e", "v5p")
            for case in (small, main)]
    jobs.append((CHIPS["h200"], main, "mosaic_gpu"))
    order = [(chip.name, case.spec, name) for chip, case, name in
             sorted(jobs, key=lambda job: command._turn(*job))]
    assert order[0] == ("h200", "quickstart", "mosaic_gpu")
    assert [spec for _, spec, _ in order[1:]] == ["quickstart"] * 4 + ["one_row"] * 4
    assert [chip for chip, *_ in order[5:]] == ["h100", "v5p", "h200", "v6e"]


def test_what_is_left_is_told(capsys, monkeypatch):
    clock = iter([0.0, 60.0, 100.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    tell = command._Progress(100)
    row = compiled.Row("h200", "linear", "wide", "forward", backend="xla", seconds=1.0)
    tell(row, False)  # kept, which takes no time and is not told
    tell(row, True)
    assert capsys.readouterr().err == ("2/100, 1 h 38 min left at most h200 linear wide forward "
                                       "xla: compiled\n")
    tell.bar = True
    tell(row, True)
    assert capsys.readouterr().err.startswith("\r" + "#" * 1 + "." * 19 + " 3/100, 1 h 21 min")


def test_what_failed_is_tried_again():
    kept = compiled.Kept(None)
    kept._rows = {"a": compiled.Row("here", "linear", "one_row", "forward", error="broke"),
                  "b": compiled.Row("here", "linear", "one_row", "forward", seconds=1.0)}
    assert kept.get("a") is None
    assert kept.get("a", failed=True) is kept._rows["a"]  # and told where nothing is tried
    assert kept.get("b") is kept._rows["b"]
    assert kept.get("c") is None


def test_another_source_makes_another_key(monkeypatch, tmp_path):
    (case,) = cases(("linear",), ("one_row",), abstract=True)
    (other,) = cases(("grouped_matmul",), ("even",), abstract=True)
    file = str(tmp_path / "rows.jsonl")
    sources = compiled.sources

    def keys(name, text):
        monkeypatch.setattr(compiled, "sources", lambda root: sources(root) | {name: text})
        kept = compiled.Kept(file)
        return [kept.key(c, "forward", HERE, "xla") for c in (case, other)]

    first, second = keys("linear", b"1"), keys("linear", b"2")
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert not set(keys("", b"3")) & {*first, *second}  # what all share
    assert keys("mosaic_gpu", b"4") == keys("mosaic_gpu", b"5")  # no kernel of Hopper's


def test_what_only_gpus_kernels_share_ages_no_other_row():
    """A root file written in Mosaic GPU's terms is named among those of its backend."""
    root = Path(compiled.__file__).parent
    found = {p.stem for p in root.glob("*.py") if "mosaic_gpu as plgpu" in p.read_text()}
    assert {"hopper", "products"} < found
    assert {compiled._SHARED.get(name) for name in found} == {"mosaic_gpu"}


def test_a_file_of_something_else_is_refused(here, tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("hello\n")
    with pytest.raises(SystemExit):
        here(["--op", "linear", "--keep", str(file)])
    assert f"--keep {file}: line 1 is not a row" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        here(["--op", "linear", "--kept-only", "--keep", ""])
    assert "--kept-only needs --keep FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        here(["--op", "linear", "--keep", str(tmp_path / "none" / "rows")])
    assert "No such file" in capsys.readouterr().err


def test_a_page_counts_and_tells_what_did_not_compile():
    rows = [compiled.Row("h200", "an_op", "small", "forward", backend="xla", seconds=1.2),
            compiled.Row("h200", "an_op", "large", "forward", backend="mosaic_gpu", seconds=2.0,
                         kernels=3, registers=168, shared_bytes=1024, spilled_bytes=0),
            compiled.Row("h200", "an_op", "wrong", "forward", backend="xla", error="E: no\nmore"),
            compiled.Row("v5p", "an_op", "small", "forward", refused={"xla": "too odd"})]
    assert "programs; the others" not in compiled.markdown(rows, 4)
    page = compiled.markdown(rows, 9)
    assert "4 of 9 programs; the others were not tried." in page
    assert "| h200 | xla | 1 | 0 | 0 | 0 | 1 | 0 | 1 |" in page
    assert "| h200 | mosaic_gpu | 1 | 0 | 0 | 0 | 0 | 0 | 2 |" in page
    assert "- FAILED h200 an_op wrong forward: E: no\n" in page
    assert "- refused v5p an_op small forward: xla: too odd" in page
    assert page.count("| 168 |") == 1
    assert "| small |" not in page


def test_a_named_backend_that_refuses_is_no_failure(here, capfd):
    assert here(["--op", "grouped_matmul", "--spec", "nothing", "--backend", "mosaic_gpu"]) == 0
    assert "refused here grouped_matmul nothing forward: mosaic_gpu: needs an NVIDIA GPU" \
        in capfd.readouterr().out


def test_what_breaks_unannounced_fails(monkeypatch, here, capfd):
    def broken(x, w):
        raise NotImplementedError("no such instruction")

    (case,) = cases(("linear",), ("one_row",), abstract=True)
    op = Op("linear", (Backend("broken", broken), *case.op.backends))
    case = dataclasses.replace(case, op=op, call=op)
    monkeypatch.setattr(command, "cases", lambda *chosen, abstract: [case])
    argv = ["--op", "linear", "--spec", "one_row"]
    assert here(argv) == 1
    assert "FAILED here linear one_row forward: NotImplementedError: no such instruction" \
        in capfd.readouterr().out
    monkeypatch.setitem(command.DECLARED, ("linear", None, None, "cpu"), "not yet")
    assert here(argv) == 0
    assert "refused here linear one_row gradient: not yet" in capfd.readouterr().out


def test_a_workload_larger_than_the_chip_is_refused_with_both_numbers():
    (case,) = cases(("linear",), ("wide",), abstract=True)
    (x, w), _ = case.shapes()
    assert (x.shape, x.dtype, w.shape, w.dtype) == (
        (16384, 4096), "bfloat16", (4096, 4096), "float32")
    # 134 MB of rows, as much of results and 67 MB of a matrix
    small = dataclasses.replace(HERE, memory=1e8)
    row = command.compile_case(case, "forward", small, command._one(small), "xla")
    assert row.troubles == ["refused here linear wide forward: arguments and results take 0.3 GB, "
                            "the chip has 0.1"]


def test_the_assemblers_report_is_read():
    text = """
Resources(smem_scratch_bytes=229376, tmem_scratch_cols=0)
Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)
    0 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 16 barriers, 1 bytes smem
"""
    report = command._assembler_report(text)
    assert report == [(168, 229376, 16), (90, 1024, 0)]
    row = compiled.Row("h200", "an_op", "a_spec", "forward", kernels=2)
    command._fill_in(row, report, (9, 0))
    assert (row.registers, row.shared_bytes, row.spilled_bytes) == (168, 229376, 16)
    assert row.failed  # it spills
    again = compiled.Row("h100", "an_op", "a_spec", "forward", kernels=2)
    command._fill_in(again, [], (9, 0))
    assert again.spilled_bytes == 16
    for other, capability in (("b200", (10, 0)), ("v5p", None)):  # another compiler's kernels
        row = compiled.Row(other, "an_op", "a_spec", "forward", kernels=2)
        command._fill_in(row, [], capability)
        assert row.registers is None
    assert command._assembler_report("nothing to say") == []
    waits = compiled.Row("h200", "an_op", "a_spec", "forward", backend="b", seconds=1.0,
                        serialized=True)
    assert waits.failed
    assert compiled.table([waits]).endswith("FAILED h200 an_op a_spec forward: asynchronous "
                                           "products are serialized")


def test_workloads_for_tensor_cores_are_compiled_by_kernels_alone():
    other, awkward, large = cases(("token_sparse",), ("csa_64k", "tile_any", "dsa_4k"),
                                  abstract=True)
    assert (large.hopper, awkward.hopper, other.hopper) == (True, True, False)
    hopper = ["mosaic_gpu"] if RECENT else []
    for chip, for_large, small in (("v5p", ["mosaic_tpu"], []), ("h200", hopper, hopper)):
        assert list(command.backends_for(large, CHIPS[chip])) == for_large
        assert list(command.backends_for(awkward, CHIPS[chip])) == small
        assert "xla" in command.backends_for(large, CHIPS[chip], named=True)
        assert "xla" in command.backends_for(other, CHIPS[chip])


def test_a_gpu_is_described_as_xla_reads_it():
    text = CHIPS["b200"]._config()
    assert "cuda_compute_capability { major: 10 minor: 0 }" in text
    assert "core_count: 148 " in text
    assert 'device_description_str: "NVIDIA B200"' in text


@pytest.mark.slow
@pytest.mark.skipif(CHIPS["h200"].missing() is not None,
                    reason=f"needs {CHIPS['h200'].missing()}, of the extra 'compile'")
@pytest.mark.parametrize(("op", "spec", "kernels"), [
    ("grouped_matmul", "tile_edges", [1, 3]), ("block_sparse", "nsa_64k", [1, 3]),
    ("token_sparse", "csa_64k", [1, 3]), ("token_sparse", "dsa_v2_lite_4k", [1, 3]),
    ("scaled_matmul", "tile_edges", [1, 3]), ("grouped_swiglu", "olmoe", [1, 4]),
    ("cross_entropy", "gpt2", [1, 2]), ("index_kl_listed", "tile_heads", [1, 3]),
    ("index_select", "tile_keys", [1]), ("flash", "tile_all", [1, 3]),
    ("flash", "mla_v3_4k", [1, 4])])
def test_it_compiles_for_a_hopper_gpu(op, spec, kernels):
    argv = ["--target", "h200", "--op", op, "--spec", spec, "--json", "--backend", "mosaic_gpu",
            "--keep", ""]
    done = subprocess.run([sys.executable, "-m", "kernels_pallas.compile", *argv], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert [row["kernels"] for row in rows] == kernels
    for row in rows:
        assert row["backend"] == "mosaic_gpu"
        assert row["spilled_bytes"] == 0
        assert 0 < row["registers"] <= 168  # 384 threads share 65,536
        assert row["shared_bytes"] <= 232448


@pytest.mark.slow
@pytest.mark.skipif(CHIPS["v5p"].missing() is not None,
                    reason=f"needs {CHIPS['v5p'].missing()}, of the extra 'compile'")
@pytest.mark.parametrize(("op", "spec"), [
    ("grouped_matmul", "olmoe"), ("block_sparse", "nsa_4k"), ("token_sparse", "dsa_4k"),
    ("index_kl_listed", "dsa_4k"), ("scaled_matmul", "tile_edges")])
def test_it_compiles_for_a_tpu_and_keeps_the_rows(op, spec, tmp_path):
    file = tmp_path / "rows.jsonl"
    argv = ["--target", "v5p", "--op", op, "--spec", spec, "--json", "--backend", "mosaic_tpu",
            "--keep", str(file)]
    for _ in range(2):  # the second time from the file
        done = subprocess.run([sys.executable, "-m", "kernels_pallas.compile", *argv], cwd=ROOT,
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = json.loads(done.stdout)
        assert [row["direction"] for row in rows] == ["forward", "gradient"]
        assert all(row["backend"] == "mosaic_tpu" and row["kernels"] for row in rows)
        assert len(file.read_text().splitlines()) == 1 + 2
