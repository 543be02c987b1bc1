"""The bench command: what it is asked, and that its numbers follow from its timings."""

import dataclasses
import json

import pytest

from kernels_pallas import bench
from kernels_pallas.op import Backend, Op

QUICK = ["--rounds", "2", "--matmul", "64"]


@pytest.mark.parametrize(("argv", "says"), [
    ([], "required: --op"),
    (["--op", "flush"], "op 'flush' is unknown"),
    (["--op", "linear", "--spec", "olmoe"], "spec 'olmoe' is unknown"),
    (["--op", "linear", "--backend", "cudnn"], "backend 'cudnn' is unknown; there are reference"),
    (["--op", "linear", "--rounds", "1"], "--rounds 1: quartiles need at least 2"),
    (["--op", "linear", "--direction", "back"], "invalid choice: 'back'"),
])
def test_wrong_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_rates_follow_from_the_median(capsys):
    assert bench.main(["--op", "linear", "--spec", "one_row", *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    forward, gradient = found["rows"]
    assert (forward["direction"], gradient["direction"]) == ("forward", "gradient")
    for row, flops in ((forward, 1920), (gradient, 3 * 1920)):
        assert row["backend"] == "xla"
        assert row["low"] <= row["median"] <= row["high"]
        assert row["flops_per_second"] * row["median"] == pytest.approx(flops)
        assert row["of_ceiling"] * found["matmul_flops_per_second"] == pytest.approx(
            row["flops_per_second"])
    # a float32 row, the matrix 24 x 40 and the result
    assert forward["bytes_per_second"] * forward["median"] == pytest.approx(4 * (24 + 960 + 40))


def test_a_refusal_is_shown_and_a_failure_fails(monkeypatch, capsys):
    argv = ["--op", "grouped_matmul", "--spec", "nothing", "--direction", "forward", *QUICK]
    assert bench.main(argv) == 0
    out = capsys.readouterr().out
    assert "refused: needs an NVIDIA GPU" in out
    assert [line.split()[3] for line in out.splitlines()[2:4]] == ["xla", "mosaic_gpu"]

    def broken(x, w, layout):
        raise NotImplementedError("no such instruction")

    (case,) = bench.cases(("grouped_matmul",), ("nothing",))
    op = Op("grouped_matmul", (Backend("broken", broken),))
    case = dataclasses.replace(case, op=op, call=op)
    monkeypatch.setattr(bench, "cases", lambda *chosen, speed: [case])
    assert bench.main(argv) == 1
    assert "FAILED NotImplementedError: no such instruction" in capsys.readouterr().out
