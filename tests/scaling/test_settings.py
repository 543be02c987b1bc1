"""Laws of learning rate and batch by the command: planted ones come back, mistakes are one line."""

import json

import numpy as np
import pytest

from sparse_pretrain import cli
from sparse_pretrain.planning import chips, forecast
from sparse_pretrain.scaling.fit import hyper, settings

SIZES = [(n, d) for n in (1e7, 4e7, 1.6e8) for d in (1e8, 1e9, 1e10)]


def grid(law, setting, sizes=SIZES, span=3.0, **given):
    """Rows of a CSV: at each size, losses about the law's best value."""
    rows = []
    for n, d in sizes:
        best = hyper.evaluate(law, params=n, tokens=d, flops=6 * n * d)
        for step in np.arange(-span, span + 0.1):
            value = best * 2 ** (step / 2)
            loss = 3 + 0.1 * np.log(value / best) ** 2
            rows.append({"params": n, "tokens": d, setting: value, "loss": loss} | given)
    return rows


def written(path, rows):
    names = list(rows[0])
    lines = [",".join(names), *(",".join(repr(float(r[k])) for k in names) for r in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("setting", "of", "truth"),
    [
        ("lr", "flops", hyper.DEEPSEEK["lr"]),
        ("lr", "params,tokens", hyper.STEP_LAW["lr"]),
        ("batch", "tokens", hyper.STEP_LAW["batch"]),
    ],
)
def test_a_planted_law_comes_back_by_the_command(setting, of, truth, tmp_path, capsys):
    file = written(tmp_path / "rates.csv", grid(truth, setting))
    argv = ["fit", f"--csv={file}", f"--law={setting}", f"--of={of}", f"--workdir={tmp_path}"]
    assert cli.main([*argv, "--json"]) == 0
    law = json.loads(capsys.readouterr().out)
    assert law["constants"] == pytest.approx(truth, rel=1e-6)
    assert law["held_out"] < 1e-6
    assert len(law["optima"]) == 9
    assert law["left"] == []
    assert settings.read(tmp_path / f"{setting}.json")["constants"] == law["constants"]
    assert cli.main(argv) == 0
    assert "factor" in capsys.readouterr().out


def test_seeds_are_averaged_and_a_batch_is_taken_at_its_best_rate():
    rows = grid(hyper.STEP_LAW["batch"], "batch", SIZES[:3], lr=1e-3)
    worse = [row | {"lr": 3e-3, "loss": row["loss"] + 0.3 * np.log(row["batch"])} for row in rows]
    found, left = settings.optima([*rows, *worse], "batch")
    assert left == []
    best = [hyper.evaluate(hyper.STEP_LAW["batch"], tokens=o["tokens"]) for o in found]
    assert [o["value"] for o in found] == pytest.approx(best)
    seeds = [row | {"loss": row["loss"] + sign * 0.2} for row in rows for sign in (-1, 1)]
    again, _ = settings.optima(seeds, "batch")
    assert [o["loss"] for o in again] == pytest.approx([3.0] * 3)
    assert [o["runs"] for o in again] == [14] * 3
    assert [o["values"] for o in again] == [7] * 3


def test_a_best_value_at_the_edge_is_left_out_and_too_few_make_no_law(tmp_path, capsys):
    rows = grid(hyper.DEEPSEEK["lr"], "lr", SIZES[:3])
    best = min(rows[:7], key=lambda r: r["loss"])["lr"]
    rows = [r for r in rows[:7] if r["lr"] <= best] + rows[7:]
    file = written(tmp_path / "rates.csv", rows)
    argv = ["fit", f"--csv={file}", "--law=lr", f"--workdir={tmp_path}"]
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    assert "left out, the best of them" in said.out
    assert "is at an end of the grid" in said.out
    assert said.err == "error: --law=lr: no law: optima: 2 points for 2 constants\n"
    with pytest.raises(ValueError, match="holds no law: optima: 2 points"):
        settings.read(tmp_path / "lr.json")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--law=lr"], "it needs lr or batch"),
        (["--law=lr", "--of=width"], "of: 'width' is not one of flops, params, tokens"),
        (["--tasks=t.jsonl"], "--tasks: scores runs, and a CSV has none"),
        (["--law=chinchila"], "law: 'chinchila' is not one of chinchilla"),
    ],
)
def test_a_mistake_is_one_line(argv, said, tmp_path, capsys):
    rows = grid(hyper.DEEPSEEK["lr"], "lr")
    if argv == ["--law=lr"]:
        rows = [{k: v for k, v in row.items() if k != "lr"} for row in rows]
    file = written(tmp_path / "rates.csv", rows)
    assert cli.main(["fit", f"--csv={file}", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_budget_follows_the_laws_it_is_given():
    rung = next(iter(forecast.ladder()))
    law = {"constants": {"factor": 2.0**15, "flops": 0.0}}  # 16 rows of 2048
    rate = {"constants": {"factor": 0.5, "tokens": -0.1}}
    told = forecast.spend(
        "1h", chips.parse("h100:1"), None, rungs=[rung], laws={"batch": law, "lr": rate}
    )
    assert told["batch"] == 16
    assert told["lr"] == pytest.approx(0.5 * told["tokens"] ** -0.1)
    plain = forecast.spend("1h", chips.parse("h100:1"), None, rungs=[rung])
    work = plain["params"] * 6
    assert plain["lr"] == pytest.approx(0.3118 * (work * plain["tokens"]) ** -0.125)
