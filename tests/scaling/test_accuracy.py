"""Curves from loss to accuracy: planted ones are found, and nothing is said beyond them."""

import dataclasses
import json

import numpy as np
import pytest

from sparse_pretrain.scaling import calibration, forecast, planted
from sparse_pretrain.scaling.fit import accuracy, fitting, record, workdirs

MIDDLE, SLOPE, CHANCE, QUESTIONS = 2.0, 3.0, 0.25, 400


def right(loss):
    return CHANCE + (1 - CHANCE) / (1 + np.exp(SLOPE * (np.asarray(loss) - MIDDLE)))


def runs(rng, losses):
    return rng.binomial(QUESTIONS, right(losses)) / QUESTIONS


def curve_of(rng, losses=None):
    losses = np.linspace(1.6, 2.6, 20) if losses is None else losses
    n = np.full(len(losses), QUESTIONS)
    return accuracy.fit("t", losses, runs(rng, losses), questions=n, chance=CHANCE, bootstrap=60)


def test_a_planted_curve_is_found_and_its_intervals_hold_further_runs(rng):
    covered = inside = 0
    for _ in range(12):
        curve = curve_of(rng)
        low, high = curve.intervals["middle"]
        covered += low <= MIDDLE <= high
        said = accuracy.predict(curve, 1.55)
        assert said["validity"].startswith("extrapolated: loss 1.55 against 1.6 to 2.6")
        inside += said["interval"][0] <= runs(rng, np.array([1.55]))[0] <= said["interval"][1]
    assert curve.slope == pytest.approx(SLOPE, rel=0.5)
    assert covered >= 9
    assert inside >= 9
    wide = accuracy.predict(curve, 2.0, [1.9, 2.1])["interval"]
    narrow = accuracy.predict(curve, 2.0)["interval"]
    assert wide[1] - wide[0] > narrow[1] - narrow[0] + 0.08


def test_nothing_is_said_where_nothing_is_known(rng):
    curve = curve_of(rng)
    far = accuracy.predict(curve, 1.3)
    assert far["accuracy"] is None
    assert far["interval"] is None
    assert far["validity"].startswith("outside validity: loss 1.3 against 1.6 to 2.6 of 20")
    guessing = rng.binomial(QUESTIONS, np.full(12, CHANCE)) / QUESTIONS
    n, losses = np.full(12, QUESTIONS), np.linspace(2, 3, 12)
    flat = accuracy.fit("t", losses, np.minimum(guessing, 0.26), questions=n, chance=CHANCE,
                        bootstrap=40)  # fmt: skip
    assert accuracy.predict(flat, 2.5)["validity"].startswith("outside validity: no fitted run")
    rising = accuracy.fit("t", losses, right(losses)[::-1], questions=n, chance=CHANCE,
                          bootstrap=40)  # fmt: skip
    assert "does not fall with loss" in accuracy.predict(rising, 2.5)["validity"]
    assert "does not fall" in accuracy.described(rising.to_json())


@pytest.mark.parametrize(
    ("losses", "values", "n", "chance", "said"),
    [
        ([1, 2, 3], [0.5] * 3, [9] * 3, 0, "takes 4 runs, got 3"),
        ([1, 2, 3, 4], [0.5, 1.5, 0, 1], [9] * 4, 0, r"must lie in \[0, 1\], got 1.5"),
        ([1, 2, 3, 4], [0.5] * 4, [9, 0, 9, 9], 0, "questions: must be positive, got 0"),
        ([1, 2, 3, 4], [0.5] * 4, [9] * 4, 1.0, r"chance: must lie in \[0, 1\), got 1"),
    ],
)
def test_a_mistake_names_its_number(losses, values, n, chance, said):
    with pytest.raises(ValueError, match=said):
        accuracy.fit("t", losses, values, questions=n, chance=chance)


def test_every_forecast_loss_has_an_accuracy_beside_it(tmp_path, rng):
    fit = fitting.fit(planted.sweep(1, noise=0.001), bootstrap=40, follow=8)
    inside = {"params": fit.span["params"][0] * 4, "tokens": fit.span["tokens"][0] * 4}
    (bare,) = forecast.loss(fit, **inside)["accuracy"]
    assert bare["accuracy"] is None
    assert bare["validity"] == accuracy.NONE
    losses = np.linspace(*fit.span["loss"], 20)
    n = np.full(20, QUESTIONS)
    curve = accuracy.fit("t", losses, 0.3 + 0.5 * (losses[-1] - losses) / np.ptp(losses),
                         questions=n, chance=CHANCE, bootstrap=40)  # fmt: skip
    fit = dataclasses.replace(fit, accuracy=(curve.to_json(),))
    (tmp_path / "fit.json").write_text(json.dumps(fit.to_json()))
    back = record.read(tmp_path / "fit.json")
    said = forecast.loss(back, **inside)
    (told,) = said["accuracy"]
    expected = accuracy.predict(curve, said["loss"])["accuracy"]
    assert told["accuracy"] == pytest.approx(expected, rel=1e-5)
    assert told["interval"][0] < told["accuracy"] < told["interval"][1]
    assert "% right" in accuracy.sentence(told)
    assert forecast.optimal(back)[0]["accuracy"][0]["task"] == "t"
    (beyond,) = forecast.loss(back, params=1e15, tokens=1e15)["accuracy"]
    assert beyond["validity"] == "outside validity: the loss itself is"


def test_runs_say_what_they_were_scored_on(tmp_path):
    for i in range(5):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        config = {"data": {"source": "synthetic:copy"}}
        (folder / "run.json").write_text(json.dumps({"status": "finished", "config": config}))
        summary = {"flops": 6e9, "tokens": 1e5, "nats_per_token": 3 - i / 2, "steps": 100}
        summary |= {"accuracy": 0.2 * i, "heldout_tokens": 500, "train_cpu_seconds": 2.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        if i:
            task = {"continuation": {"accuracy": 0.2 + i / 10, "count": 300, "chance": 0.25}}
            (folder / workdirs.TASKS).write_text(json.dumps(task))
    rows = workdirs.rows(tmp_path)[0]
    assert [row["batch"] for row in rows] == [1000.0] * 5
    assert [row["cpu_seconds"] for row in rows] == [2.0] * 5
    found = {curve.task: curve for curve in accuracy.of_rows(rows, bootstrap=20)}
    assert found["synthetic:copy"].runs == 5
    assert found["synthetic:copy"].chance == 0.0
    assert found["continuation"].runs == 4
    assert found["continuation"].chance == 0.25
    assert accuracy.of_rows(rows[:3]) == []


def test_accuracy_is_scored_like_loss(tmp_path, monkeypatch):
    told = {"task": "t", "accuracy": 0.5, "interval": [0.45, 0.55], "validity": "inside"}
    costs = {"seconds": 1.0, "seconds_interval": [0.5, 2], "memory": 1.0, "memory_interval": [0, 2]}
    base = {
        "arm": "a",
        "width": 8,
        "params": 1e4,
        "flops": 6e9,
        "loss": 2.0,
        "interval": [1.9, 2.1],
    }
    made = [base | costs | {"tokens": 1e5 * i, "accuracy": [told]} for i in (1, 2)]
    (tmp_path / calibration.FILE).write_text(json.dumps(made))
    rows = [
        {"arm": "a", "width": 8, "tokens": 1e5 * i, "loss": 2.0, "seconds": 1.0, "memory": 1.0}
        | {"tasks": {"t": {"accuracy": right}}}
        for i, right in ((1, 0.5), (2, 0.6))
    ]
    monkeypatch.setattr(calibration.isoflop, "results", lambda root: rows)
    found = calibration.score(tmp_path)
    assert found["inside"] == {"loss": 2, "seconds": 2, "memory": 2, "accuracy": 1}
    assert found["of"]["accuracy"] == 2
