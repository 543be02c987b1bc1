"""Iso-FLOP grids and what is read off them: parabolas, leverage, the next run, the page."""

import functools
import json

import numpy as np
import pytest

from sparse_pretrain import cli
from sparse_pretrain.commands import isoflop as command
from sparse_pretrain.report import isoflop as page
from sparse_pretrain.scaling import calibration, children, forecast, isoflop, planted, sizes
from sparse_pretrain.scaling.engines import local
from sparse_pretrain.scaling.fit import design, fitting, hyper, leverage, parabola

SMALL = "experiments/isoflop.py:dense"


def test_a_parabola_finds_its_own_vertex():
    params = np.array([1e6, 2e6, 4e6, 8e6])
    loss = 3.0 + 0.05 * (np.log(params) - np.log(3e6)) ** 2
    found = parabola.vertex(params, loss)
    assert found["params"] == pytest.approx(3e6)
    assert found["loss"] == pytest.approx(3.0)
    assert found["inside"]
    assert not parabola.vertex(params, 3 + 0.05 * np.log(params / 1e7) ** 2)["inside"]
    assert not parabola.vertex(params, 3 - 0.05 * np.log(params / 3e6) ** 2)["inside"]
    with pytest.raises(ValueError, match="takes 3 sizes, got 2"):
        parabola.vertex(params[:2], loss[:2])


@pytest.fixture(scope="module")
def planted_fit():
    table = planted.sweep(1, noise=0.001)
    return table, fitting.fit(table, bootstrap=60, follow=8)


def test_parabolas_give_the_exponent_but_biased(planted_fit):
    table, fit = planted_fit
    budget = np.round(table.flops, -15)
    power = parabola.exponent(parabola.budgets(budget, table.params, table.loss))
    truth = planted.TRUTH["beta"] / (planted.TRUTH["alpha"] + planted.TRUTH["beta"])
    assert power["exponent"] == pytest.approx(truth, abs=0.1)
    even = parabola.bias(fit, budget, table.params)
    wide = parabola.bias(
        fit, budget, np.where(table.params < 0.1 * budget**0.5, 0.1, 1) * table.params
    )
    assert all(abs(np.log(row["factor"])) < 0.05 for row in even)
    shifts = [
        abs(np.log(b["factor"])) - abs(np.log(a["factor"])) for a, b in zip(even, wide, strict=True)
    ]
    assert min(shifts) > 0.01  # sizes that lie wider on one side move the vertex


def test_leverage_is_the_factor_it_was_planted_with(planted_fit):
    import dataclasses

    _, dense = planted_fit
    factor = 1.7  # L_sparse(N, D) = L_dense(factor N, D) needs factor times the compute to match
    move = np.array([-dense.theta[3] * np.log(factor), 0, 0, 0, 0])
    samples = dense.samples - np.outer(dense.samples[:, 3] * np.log(factor), [1, 0, 0, 0, 0])
    sparse = dataclasses.replace(dense, theta=dense.theta + move, samples=samples)
    found = leverage.between(dense, sparse, 1e20)
    assert found["leverage"] == pytest.approx(factor, rel=1e-6)
    assert found["interval"] == pytest.approx([factor, factor], rel=1e-6)
    lower = dataclasses.replace(sparse, theta=sparse.theta - [0, 0, 0.5, 0, 0])
    assert leverage.between(dense, lower, 1e20)["leverage"] == np.inf


@pytest.mark.parametrize(
    ("active", "granularity", "flops", "published"),
    [
        (0.031, 12, 1e18, 2.9),
        (0.031, 12, 1e19, 3.6),
        (0.031, 12, 1e20, 4.6),
        (0.125, 8, 1e18, 1.95),
        (0.125, 8, 1e19, 2.3),
        (0.125, 8, 1e20, 2.6),
    ],
)
def test_the_published_leverage_law(active, granularity, flops, published):
    assert leverage.ling(active, granularity, flops) == pytest.approx(published, rel=0.03)


def test_the_next_run_takes_off_what_linear_algebra_says(planted_fit):
    _, fit = planted_fit
    candidates = [(1e8, 2e9), (1e9, 2e10), (5e9, 1e10)]
    target = (2e9, 3e10)
    rows = design.next_run(fit, candidates, target)
    information = np.linalg.inv(np.cov(fit.samples.T))
    h = design._gradients(fit, [target])[0]
    for row in rows:
        g = design._gradients(fit, [(row["params"], row["tokens"])])[0]
        after = np.linalg.inv(information + np.outer(g, g) / fit.noise**2)
        assert row["after"] == pytest.approx(1.96 * (h @ after @ h) ** 0.5, rel=1e-4)
    gains = [row["gain_per_flop"] for row in rows]
    assert gains == sorted(gains, reverse=True)


def test_laws_of_learning_rate_and_batch(rng):
    rates = 1e-3 * 2 ** np.arange(0, 4.5, 0.5)
    found = hyper.best(rates, 3 + 0.1 * np.log(rates / 3.3e-3) ** 2)
    assert found["value"] == pytest.approx(3.3e-3)
    assert found["inside"]
    assert not hyper.best(rates, -rates)["inside"]
    flops = np.geomspace(1e17, 1e20, 8)
    truth = hyper.DEEPSEEK["lr"]
    optima = [hyper.evaluate(truth, flops=c) for c in flops]
    fitted = hyper.power({"flops": flops}, optima * np.exp(0.05 * rng.standard_normal(8)))
    low, high = fitted["intervals"]["flops"]
    assert low < truth["flops"] < high
    assert 0 < fitted["held_out"] < 0.2
    assert hyper.evaluate(truth, flops=1e20) == pytest.approx(0.3118 * 1e20**-0.125)
    with pytest.raises(ValueError, match="tokens: the law needs it"):
        hyper.evaluate(hyper.STEP_LAW["lr"], params=1e8)


def test_a_grid_spends_each_budget_and_sees_no_token_twice():
    family = sizes.family(SMALL, [8, 16, 24, 32], {}, vocab=257)
    grid = isoflop.points("a", family, [2e9, 4e9], most_tokens=300_000, count=3, ratio=10)
    assert len(grid) == 6
    for p in grid:
        assert p.flops == pytest.approx(p.budget, rel=0.03)
        assert p.tokens <= 300_000
        assert p.overrides["steps"] * 512 == p.tokens
    with pytest.raises(ValueError, match="a budget needs 3 sizes"):
        isoflop.points("a", family, [4e9], most_tokens=30_000)
    wide = {size.width: size for size in family}
    assert wide[32].overrides["model.blocks.layer.attention.heads"] == 4
    assert wide[32].overrides["model.blocks.layer.ffn.hidden"] == 96


def test_a_folder_holds_one_grid(tmp_path):
    family = sizes.family(SMALL, [8, 16, 24], {}, vocab=257)
    make = lambda c: isoflop.points(SMALL, family, [c], most_tokens=10**6)  # noqa: E731
    isoflop.write(tmp_path, make(4e9))
    assert isoflop.write(tmp_path, make(4e9)).is_file()
    assert isoflop.read(tmp_path) == make(4e9)
    with pytest.raises(ValueError, match="holds another grid"):
        isoflop.write(tmp_path, make(5e9))
    assert isoflop.results(tmp_path) == []


def test_finished_grids_are_fitted_and_shown(tmp_path, capsys):
    rows = []
    for place, arm in enumerate(("dense", "moe")):
        table = planted.sweep(place, noise=0.002)
        for i in range(len(table)):
            flops = float(np.round(table.flops[i], -15))
            size, tokens = table.params[i], table.tokens[i]
            rows.append(
                {
                    "arm": arm,
                    "budget": flops,
                    "label": f"{arm}-{i}",
                    "width": 64,
                    "params": size,
                    "tokens": tokens,
                    "corpus": "c",
                    "seconds": 1.0,
                    "loss": float(planted.loss(size * (1 + place), tokens)),
                }
            )
    said = isoflop.analyse(rows, bootstrap=60)
    found = said["leverage"]["moe"][-1]
    assert found["leverage"] == pytest.approx(2.0, rel=0.02)
    command.write(tmp_path, said, rows)
    command.show(said, tmp_path, as_json=False)
    assert "leverage 2" in capsys.readouterr().out
    page = (tmp_path / "isoflop.html").read_text()
    assert page.count("<svg") == 4
    assert "Known bias" in page
    assert "Buy next" in page
    assert json.loads((tmp_path / "isoflop.json").read_text())["leverage"]["moe"]


def test_a_budget_without_an_optimum_is_null_in_strict_json(tmp_path, monkeypatch, capsys):
    hill = parabola.vertex(np.array([1e4, 2e4, 4e4]), np.array([2.0, 2.1, 2.0]))
    assert not hill["inside"]
    said = {"arms": {"dense": {"parabolas": [hill]}}, "leverage": {}, "fits": {}}
    monkeypatch.setattr(page, "write", lambda *_: None)
    command.write(tmp_path, said, [])
    command.show(said, tmp_path, as_json=True)
    for text in ((tmp_path / "isoflop.json").read_text(), capsys.readouterr().out):
        (found,) = json.loads(text, parse_constant=pytest.fail)["arms"]["dense"]["parabolas"]
        assert found["loss"] is None


def test_forecasts_are_made_once_and_scored_by_the_runs(tmp_path, planted_fit, rng):
    _, fit = planted_fit
    family = sizes.family(SMALL, [8, 16, 24], {}, vocab=257)
    points = isoflop.points(SMALL, family, [4e9, 8e9], most_tokens=10**6)
    chosen = calibration.choose(points, points, {SMALL: fit}, 4)
    assert len(chosen) == 4
    assert {p.budget for p in chosen} == {4e9, 8e9}
    rows = [
        {"arm": SMALL, "params": n, "tokens": d, "seconds": 1e-9 * n * d, "memory": 1e8}
        for n, d in rng.uniform(1e4, 1e5, (8, 2))
    ]
    made = calibration.write(tmp_path, chosen, {SMALL: fit}, rows)
    with pytest.raises(ValueError, match="a forecast is made once"):
        calibration.write(tmp_path, chosen, {SMALL: fit}, rows)
    with pytest.raises(ValueError, match="no run of"):
        calibration.score(tmp_path)
    todo = children.children(tmp_path / isoflop.SWEEP, tmp_path)
    for i, (child, said) in enumerate(zip(todo, made, strict=True)):
        child.workdir.mkdir()
        record = {"status": "finished", "config": {"model": {"width": said["width"]}}}
        (child.workdir / "run.json").write_text(json.dumps(record))
        loss = said["loss"] if i else 2 * said["interval"][1]  # the first is missed
        summary = {"flops": said["flops"], "tokens": said["tokens"], "nats_per_token": loss}
        summary |= {"train_seconds": said["seconds"], "peak_memory_bytes": 1e8}
        (child.workdir / "summary.json").write_text(json.dumps(summary))
    found = calibration.score(tmp_path)
    assert found["finished"] == 4
    assert found["inside"] == {"loss": 3, "seconds": 4, "memory": 4}
    with pytest.raises(ValueError, match="has no law yet"):
        calibration.choose(points, points, {SMALL: None}, 4)


# Stands for training: the loss of a planted law, and what it took.
RUNNER = """
import json, pathlib

def run(arguments):
    flags = dict(a.removeprefix("--").split("=", 1) for a in arguments)
    workdir = pathlib.Path(flags["workdir"])
    width, steps = int(flags["config.model.width"]), int(flags["config.steps"])
    plan = json.loads((workdir.parent / "plan.json").read_text())
    row = next(r for r in plan if (r["width"], r["overrides"]["steps"]) == (width, steps))
    size, tokens = row["params"], row["tokens"]
    loss = 1.2 + 9 / size**0.25 + 60 / tokens**0.4 + 0.001 * (steps % 7 - 3)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir.parent / "trained", "a") as f:
        f.write("x")
    record = {"status": "finished", "config": {"model": {"width": width}}}
    (workdir / "run.json").write_text(json.dumps(record))
    summary = {"flops": row["flops"], "tokens": tokens, "nats_per_token": loss}
    summary |= {"bits_per_byte": loss, "steps": steps, "peak_memory_bytes": 1e8}
    summary |= {"train_seconds": 1e-9 * size * tokens}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return 0
"""


@pytest.mark.slow  # five commands and two workers: -m slow tests/scaling/test_isoflop.py
def test_the_command_runs_a_grid_through_the_sweep_and_forecasts_beyond_it(
    tmp_path, monkeypatch, capsys
):
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER)
    fake = functools.partial(local.Local, runner=f"{runner}:run")
    monkeypatch.setattr(local, "Local", fake)
    root = tmp_path / "out"
    command = ["isoflop", "--budgets=2e9,4e9,8e9,1.6e10", "--widths=8,16,24,32,48", "--sizes=3"]
    command += [f"--config={SMALL}", f"--workdir={root}", "--json", "--ratio=8"]
    command.append("--bootstrap=40")
    command.append("--config.data.source=synthetic:copy")
    assert cli.main(command) == 0
    out = json.loads(capsys.readouterr().out)["arms"][SMALL]
    assert out["runs"] == 12
    assert len(out["parabolas"]) == 4
    assert out["next"][0]["after"] < out["next"][0]["half_width"]
    assert (root / "isoflop.html").is_file()
    assert forecast.read(root / "fits" / "0").runs == 12
    assert cli.main(command) == 0
    assert (root / "trained").read_text() == "x" * 12  # nothing ran twice
    capsys.readouterr()
    assert cli.main([*command, "--beyond=run"]) == 2
    assert "--beyond=forecast first" in capsys.readouterr().err
    assert cli.main([*command, "--beyond=forecast", "--count=4"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made) == 4
    assert max(row["flops"] for row in made) > 2e10
    assert cli.main([*command, "--beyond=run"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["finished"] == 4
    assert score["inside"]["loss"] >= 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--budgets=x"], "--budgets: 'x' is not a number"),
        (["--budgets=1e9", "--sizes=2"], "--sizes: a budget takes 3 or more, got 2"),
        (["--budgets=1e9", "--ratio=0"], "--ratio: must be positive, got 0.0"),
    ],
)
def test_a_mistake_is_one_line(argv, said, capsys):
    assert cli.main(["isoflop", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
