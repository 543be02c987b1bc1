"""The one command for a chip: it goes on, keeps what failed, and its page says what was met."""

import dataclasses
import json

import pytest

from kernels_pallas import bench, measure, parity, results, supervised


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A command over the op `linear` whose backends are not run: (its arguments, what it ran)."""
    ran = []

    def speed(case, made, direction, names, rounds, peak):
        ran.append(f"{case.spec} {direction}")
        return [bench.Row(case.op.name, case.spec, direction, n, median=1e-3, low=1e-3, high=2e-3,
                          flops_per_second=1e9, of_ceiling=0.5, bytes_per_second=1e9,
                          temp_bytes=10, rounds=rounds) for n in names]

    def check(case, dtype, names):
        ran.append(f"{case.spec} parity")
        return [parity.Row(case.op.name, case.spec, dtype, n, values=0.1, same_bits=True)
                for n in names]

    known = measure.cases
    (plain,) = known(("linear",), ("plain",))

    def small(ops=(), specs=(), **which):
        """The same cases; those that are made are small, whatever the workload."""
        for case in known(ops, specs, **which):
            abstract = which.get("abstract")
            yield case if abstract else dataclasses.replace(case, make=plain.make)

    monkeypatch.setattr(bench, "bench_case", speed)
    monkeypatch.setattr(bench, "ceiling", lambda size: 1e12)
    monkeypatch.setattr(parity, "check_case", check)
    monkeypatch.setattr(measure, "cases", small)
    argv = ["--cpu", "--op", "linear", "--keep", str(tmp_path / "kept.jsonl")]
    return argv, ran


def test_the_most_telling_first_and_nothing_twice(quick, capsys):
    argv, ran = quick
    assert measure.main([*argv, "--seconds", "0"]) == measure.UNFINISHED
    assert "9 of 9 are left" in capsys.readouterr().err
    assert measure.main(argv) == 0
    assert ran[0] == "plain parity"
    assert ran[1:7] == [f"{spec} {d}" for spec in ("quickstart", "wide", "deepseek_v3")
                        for d in ("forward", "gradient")]
    assert sorted(ran[7:]) == ["one_row parity", "prime parity"]
    before = [*ran]
    assert measure.main(argv) == 0
    assert ran == before
    assert measure.main([*argv, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| linear | xla | 3 | 0 |" in out
    assert "| linear | wide | gradient | xla | 1 [1, 2] | 1 GFLOP/s | 50% | 1 GB/s | 10 B |" in out


def test_what_failed_is_kept_told_and_tried_again(quick, monkeypatch, capsys):
    argv, ran = quick
    good = bench.bench_case

    def broken(case, *rest):
        if case.spec == "wide":
            raise RuntimeError("out of memory\nand more")
        return good(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "bench_case", broken)
        assert measure.main(argv) == 1
    assert measure.main([*argv, "--markdown"]) == 0
    assert "| wide | - | - | FAILED RuntimeError: out of memory |" in capsys.readouterr().out
    ran.clear()
    assert measure.main(argv) == 0
    assert ran == ["wide forward", "wide gradient"]


def test_a_device_out_of_order_ends_the_process_before_its_row_is_kept(quick, monkeypatch):
    argv, _ = quick

    class EndedError(Exception):
        pass

    def end(why):
        assert why == "RuntimeError: illegal address"
        raise EndedError

    def unusable(n):
        raise RuntimeError("illegal address")

    def failing(case, dtype, names):
        return [parity.Row(case.op.name, case.spec, dtype, "xla", error="broke")]

    monkeypatch.setattr(parity, "check_case", failing)
    monkeypatch.setattr(measure.jnp, "ones", unusable)
    monkeypatch.setattr(supervised, "end", end)
    with pytest.raises(EndedError):
        measure.main(argv)
    assert not measure.Path(argv[-1]).exists()


@pytest.mark.parametrize(("argv", "says"), [
    (["--op", "flush"], "op 'flush' is unknown"),
    (["--rounds", "1"], "--rounds 1: quartiles need at least 2"),
    (["--op", "linear"], "there is no accelerator here"),
])
def test_wrong_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        measure.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "other").write_text('{"key": 1}\n')
    with pytest.raises(SystemExit):
        measure.main(["--keep", str(tmp_path / "other"), "--markdown"])
    assert "other: line 1 is not a result" in capsys.readouterr().err


def row(op, spec, direction, backend, median, flops, temp=0):
    return {"op": op, "spec": spec, "direction": direction, "backend": backend, "failed": False,
            "median": median, "low": median, "high": median, "flops_per_second": flops / median,
            "of_ceiling": 0.5, "bytes_per_second": 1.0, "temp_bytes": temp}


def test_bars_follow_from_the_rows():
    rows = [
        row("grouped_matmul", "olmoe", "forward", "mosaic_gpu", 1.0, 600e12),
        row("grouped_matmul", "olmoe", "gradient", "mosaic_gpu", 4.0, 1800e12),
        # backward alone: 700 and 200 of 2.5 and 1 s
        row("flash", "heads_128_16k", "forward", "mosaic_gpu", 1.0, 200e12),
        row("flash", "heads_128_16k", "gradient", "mosaic_gpu", 2.0, 700e12),
        row("flash", "heads_128_16k", "forward", "cudnn", 0.9, 200e12),
        row("flash", "moba_dense_64k", "gradient", "tokamax", 5.5, 1e12),
        row("flash", "moba_dense_64k", "gradient", "mosaic_gpu", 7.0, 1e12),
        row("block_sparse", "moba_64k", "gradient", "mosaic_gpu", 1.0, 1e12),
        row("cross_entropy", "gemma2_2b", "gradient", "mosaic_gpu", 1.0, 500e12, 226e6),
    ]
    found = results.Result("k", "NVIDIA H200", {"jax": "1"}, "2026-01-01", "forward", 8e14, rows)
    lines = results.page([found]).splitlines()

    def line(text):
        (got,) = (x for x in lines if x.startswith(f"| {text} |"))
        return [c.strip() for c in got.split("|")[3:5]]

    assert line("grouped_matmul olmoe, forward") == ["600 TFLOP/s", "met"]
    assert line("grouped_matmul olmoe, gradient") == ["450 TFLOP/s", "MISSED"]
    assert line("flash heads_128_16k, backward") == ["500 TFLOP/s", "met"]
    assert line("flash heads_128_16k, forward: cuDNN's time over ours") == ["0.90x", "MISSED"]
    assert line("flash heads_128_16k, gradient: cuDNN's time over ours") == ["not measured", "-"]
    name = "block_sparse moba_64k, gradient: times as fast as the best dense attention"
    assert line(name) == ["5.50x", "met"]
    assert line("cross_entropy gemma2_2b, gradient: memory") == ["226 MB", "met"]


def test_every_bar_names_workloads_that_exist():
    """A bar that asks for a spec of another name would stay 'not measured' for ever."""
    asked = set()

    class Every(results.Timings):
        def seconds(self, op, spec, direction, backend):
            asked.add((op, spec, backend))

        rate = temp = seconds

        def best(self, op, spec, direction):
            asked.add((op, spec, None))

    for bar in results.BARS:
        bar.found(Every([]))
    known = {(c.op.name, c.spec): c for c in measure.cases(abstract=True)}
    assert len(asked) > 15
    for op, spec, backend in asked:
        assert (op, spec) in known, (op, spec)
        assert backend in {None, *(b.name for b in known[op, spec].op.backends)}


def test_the_record_holds_results():
    for line in measure.RECORD.read_text().splitlines() if measure.RECORD.exists() else ():
        assert results.Result(**json.loads(line)).rows
        assert dataclasses.asdict(results.Result(**json.loads(line))) == json.loads(line)
