"""The fits: derivatives by differences, planted laws recovered, outliers by the stated rule."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize

from sparse_pretrain import cli
from sparse_pretrain.scaling import forecast
from sparse_pretrain.scaling.fit import batched, fitting, law, laws, record, solve, tables

TRUTH = {"A": 482.0, "B": 2085.4, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
THETA = np.array([np.log(482.0), np.log(2085.4), np.log(1.8172), 0.3478, 0.3658])


def grid(noise=0.0, seed=0, budgets=5, sizes=6, span=100.0):
    """An iso-FLOP sweep of the planted law."""
    rng = np.random.default_rng(seed)
    flops = np.repeat(1e18 * np.geomspace(1, span, budgets), sizes)
    params = 0.1 * flops**0.5 * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    tokens = flops / 6 / params
    loss = TRUTH["E"] + TRUTH["A"] / params ** TRUTH["alpha"] + TRUTH["B"] / tokens ** TRUTH["beta"]
    loss = loss * np.exp(noise * rng.standard_normal(len(loss)))
    return tables.Table(params=params, tokens=tokens, loss=loss, source="planted")


@pytest.fixture(scope="module")
def noisy():
    return grid(noise=0.004)


@pytest.fixture(scope="module")
def fitted(noisy):
    return fitting.fit(noisy, bootstrap=100)


@pytest.mark.parametrize("kind", laws.TABLE)
def test_derivatives_are_those_of_differences(kind, rng):
    columns = {
        "params": rng.uniform(1e6, 1e9, 9),
        "tokens": rng.uniform(1e8, 1e10, 9),
        "expansion": rng.uniform(1, 16, 9),
        "keys": rng.uniform(64, 4096, 9),
    }
    found = laws.TABLE[kind]
    theta = np.array([6.0, 7.5, 0.6, 0.35, 0.37, 0.1, 0.2])[: len(found.parameters)]
    features = found.build(columns)
    target = law.values(features, theta) + 0.002 * rng.standard_normal(9)
    objective = law.Objective(features, target, rng.uniform(0.5, 2, 9))
    _, gradient = objective.loss_and_gradient(theta)
    numeric = optimize.approx_fprime(theta, lambda t: float(objective.loss(t)), 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-6)
    hessian = objective.hessian(theta)
    numeric = np.stack(
        [
            (objective.loss_and_gradient(theta + e)[1] - objective.loss_and_gradient(theta - e)[1])
            / 2e-7
            for e in 1e-7 * np.eye(len(theta))
        ]
    )
    np.testing.assert_allclose(hessian, numeric, rtol=1e-4, atol=1e-4)
    direct = sum(np.exp(f @ theta) for f in features)  # the law as it is written
    np.testing.assert_allclose(np.exp(law.values(features, theta)), direct, rtol=1e-12)


def test_an_exact_law_comes_back_to_many_digits():
    found = fitting.fit(grid(), bootstrap=40)
    for name, value in TRUTH.items():
        assert found.constants[name] == pytest.approx(value, rel=1e-5), name
    assert found.dropped == ()
    assert found.held_out["max_abs_error"] < 1e-6


def test_following_more_starts_finds_nothing_lower(noisy, fitted):
    features = laws.TABLE["chinchilla"].build({"params": noisy.params, "tokens": noisy.tokens})
    objective = law.Objective(features, np.log(noisy.loss), np.ones(len(noisy)))
    rng = np.random.default_rng(1)
    many = laws.GRID[rng.choice(len(laws.GRID), 24, replace=False)]
    found = solve.minimise(objective, many, follow=24)
    assert fitted.objective <= found.loss * (1 + 1e-6)


def test_a_bootstrap_refit_is_what_scipy_finds(noisy):
    features = laws.TABLE["chinchilla"].build({"params": noisy.params, "tokens": noisy.tokens})
    target = np.log(noisy.loss)
    weights = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=3).astype(float)
    theta = batched.minimise(features, np.tile(target, (3, 1)), weights, THETA)
    for row, weight in zip(theta, weights, strict=True):
        objective = law.Objective(features, target, weight)
        other = solve.minimise(objective, np.stack([THETA, THETA * 1.05, THETA * 0.95]))
        assert float(objective.loss(row)) <= other.loss * (1 + 1e-3)


def test_a_forecast_holds_the_truth_and_says_how_far_it_reaches(fitted):
    flops = 4 * fitted.span["flops"][1]
    best = forecast.optimal(fitted, [flops])[0]
    row = forecast.loss(fitted, params=best["params"], tokens=best["tokens"])
    truth = sum(
        (TRUTH["E"], TRUTH["A"] / best["params"] ** 0.3478, TRUTH["B"] / best["tokens"] ** 0.3658)
    )
    assert row["interval"][0] < truth < row["interval"][1]
    assert row["half_width"] < 0.015
    assert row["validity"].startswith("extrapolated: flops")
    assert best["params"] * best["tokens"] * 6 == pytest.approx(flops)


def test_the_optimum_is_the_least_of_a_scan(fitted):
    row = forecast.optimal(fitted, [1e21])[0]
    sizes = row["params"] * np.geomspace(0.5, 2, 201)
    features = laws.TABLE["chinchilla"].build({"params": sizes, "tokens": 1e21 / 6 / sizes})
    losses = np.exp(law.values(features, fitted.theta))
    assert sizes[losses.argmin()] == pytest.approx(row["params"], rel=0.01)
    assert losses.min() == pytest.approx(row["loss"], rel=1e-6)


def test_runs_that_diverged_or_hardly_began_are_dropped_and_said():
    table = grid(noise=0.002)
    loss, tokens = table.loss.copy(), table.tokens.copy()
    loss[7] *= 1.5
    tokens[23] /= 3000
    bad = tables.Table(params=table.params, tokens=tokens, loss=loss)
    found = fitting.fit(bad, bootstrap=40)
    said = {row["run"]: row["reason"] for row in found.dropped}
    assert set(said) == {"row 8", "row 24"}
    assert "off the law" in said["row 8"]
    assert "tokens per parameter" in said["row 24"]
    assert fitting.fit(bad, drop="none", bootstrap=40).runs == 30
    highest = fitting.fit(bad, drop="highest:2", bootstrap=40)
    assert [row["loss"] for row in highest.dropped] == sorted(loss)[-1:-3:-1]


def test_the_joint_law_and_attention_terms_are_recovered(rng):
    table = grid()
    for kind, column, extra in (
        ("joint", "expansion", {"delta": 0.12, "omega": -0.05}),
        ("sparse_attention", "keys", {"G": 0.9, "kappa": 0.6}),
    ):
        found = laws.find(kind)
        wide = {
            "params": np.tile(table.params, 2),
            "tokens": np.tile(table.tokens, 2),
            column: np.repeat([1.0, 8.0], 30) if kind == "joint" else rng.uniform(64, 2048, 60),
        }
        first, second = extra.values()
        theta = np.append(THETA, [np.log(first) if "G" in extra else first, second])
        loss = np.exp(law.values(found.build(wide), theta))
        planted = tables.Table(wide["params"], wide["tokens"], loss, extra={column: wide[column]})
        fit = fitting.fit(planted, kind, bootstrap=40)
        for name, value in extra.items():
            assert fit.constants[name] == pytest.approx(value, rel=1e-3), name


def test_a_fit_survives_its_file(fitted, tmp_path):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(fitted.to_json()))
    back = forecast.read(tmp_path)
    assert back.constants == fitted.constants
    one, two = (forecast.loss(f, params=1e9, tokens=2e10) for f in (back, fitted))
    assert one["interval"] == pytest.approx(two["interval"], rel=1e-6)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no 'law'"):
        record.read(path)


def test_a_shipped_fit_forecasts_a_configuration_and_says_that_it_reaches_too_far():
    import dataclasses

    from sparse_pretrain import config
    from sparse_pretrain.planning import flops

    fit = forecast.read("chinchilla")
    assert fit.constants["E"] == pytest.approx(1.81724, abs=1e-4)
    experiment = config.resolve("dense_baseline")
    with pytest.raises(ValueError, match=r"model\.vocab"):
        forecast.of_config(fit, experiment, 1e6)
    model = dataclasses.replace(experiment.model, vocab=4096)
    experiment = dataclasses.replace(experiment, model=model)
    said = forecast.of_config(fit, experiment, 1e6)
    work = flops.train_flops_per_token(model, experiment.data.seq).model
    params, tokens = work / 6, 1e6
    law = 1.81722 + 477.826 / params**0.34731 + 2143.42 / tokens**0.367172
    assert said["loss"] == pytest.approx(law, rel=1e-3)
    assert said["interval"][0] < said["loss"] < said["interval"][1]
    assert said["validity"].startswith("outside validity: flops")
    (told,) = said["accuracy"]
    assert told["validity"].startswith("outside validity")
    with pytest.raises(ValueError, match="fits that ship: chinchilla"):
        forecast.read("chinchila")


def test_a_cost_forecast_holds_the_runs_to_come(rng):
    def row(params, tokens):
        noise = np.exp(0.05 * rng.standard_normal(2))
        seconds, memory = 1e-9 * params**0.8 * tokens * noise[0], 1e6 * params**0.3 * noise[1]
        return {"params": params, "tokens": tokens, "seconds": seconds, "memory": memory}

    rows = [row(n, d) for n in (1e4, 3e4, 1e5) for d in (1e5, 1e6, 1e7)]
    held = 0
    for _ in range(40):
        true = row(2e5, 2e7)
        said = forecast.cost(rows, 2e5, 2e7)
        low, high = said["seconds_interval"]
        held += low <= true["seconds"] <= high
    assert held >= 34
    assert said["memory"] == pytest.approx(1e6 * 2e5**0.3, rel=0.2)
    with pytest.raises(ValueError, match="takes 5 finished runs, got 4"):
        forecast.cost(rows[:4], 1e5, 1e6)


@pytest.mark.parametrize(
    "header", ["Model Size,Training FLOP,loss", "N,D,loss", "flops,tokens,loss"]
)
def test_columns_go_by_many_names(header, tmp_path):
    params, tokens = 1e8, 2e9
    values = {"Model Size": params, "N": params, "D": tokens, "tokens": tokens}
    values |= dict.fromkeys(("Training FLOP", "flops"), 6 * params * tokens) | {"loss": 3.0}
    path = tmp_path / "a.csv"
    path.write_text(header + "\n" + ",".join(str(values[h]) for h in header.split(",")) + "\n")
    table = tables.read_csv(path)
    assert (table.params[0], table.tokens[0]) == pytest.approx((params, tokens))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params,loss\n1,2\n", "two of `params`"),
        ("N,D,loss\n1,2,x\n", "line 2: loss: not a number, got 'x'"),
        ("N,D,loss\n1,-2,3\n", "line 2: D: must be positive, got -2"),
        ("N,D,loss\n1,2,3\n\n1,x,3\n", "line 4: D: not a number, got 'x'"),
        ("N,D,loss\n,,,more\n", "holds no rows"),
        ("N,D,loss\n", "holds no rows"),
        ("N,D,loss\n1e8,1e9,3\n2e8,1e9,2.9\n", "the law chinchilla has 5 parameters"),
        ("N,D,loss\n" + "1e8,1e9,3\n" * 9, "params: is the same in all runs"),
    ],
)
def test_a_bad_table_is_one_line(text, said, tmp_path, capsys):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert cli.main(["fit", f"--csv={path}", f"--workdir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_mistake_is_told_before_jax_is_imported(tmp_path):
    """Its import takes seconds, and minutes on a busy machine."""
    (tmp_path / "bad.csv").write_text("a,b\n")
    code = (
        "import sys\nfrom sparse_pretrain import cli\n"
        "for wrong in (['--csv=nowhere.csv'], ['--csv=bad.csv'], ['nowhere'], "
        "['--csv=bad.csv', '--law=foo']):\n"
        "    assert cli.main(['fit', *wrong]) == 2\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for line, part in zip(
        done.stderr.splitlines(),
        ("no file nowhere.csv", "has the columns a, b", "not a folder", "'foo' is not one of"),
        strict=True,
    ):
        assert part in line


def test_the_command_prints_json_and_writes_a_page(noisy, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    rows = zip(noisy.params, noisy.flops, noisy.loss, strict=True)
    path.write_text("N,C,loss\n" + "".join(f"{n},{c},{x}\n" for n, c, x in rows))
    command = ["fit", f"--csv={path}", "--bootstrap=40", f"--workdir={tmp_path / 'out'}", "--json"]
    assert cli.main([*command, "--flops=5.76e23"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert {"E", "A", "B", "alpha", "beta", "intervals", "dropped"} <= set(out)
    assert out["optimal"][0]["flops"] == 5.76e23
    assert out["optimal"][0]["validity"].startswith("outside validity")
    assert out["provenance"]["sha256"]
    page = (tmp_path / "out" / "fit.html").read_text()
    assert page.count("<svg") == 2
    assert "http-equiv" not in page
    assert "src=" not in page
    assert forecast.read(tmp_path / "out").constants["E"] == pytest.approx(out["E"])


def workdir(path, params, tokens, loss, corpus="c"):
    """A finished run's records, as far as a fit reads them."""
    path.mkdir(parents=True)
    derived = {"total_params": 3 * params, "active_params": params}
    (path / "run.json").write_text(json.dumps({"status": "finished", "derived": derived}))
    summary = {"flops": 6 * params * tokens, "tokens": tokens, "nats_per_token": loss}
    (path / "summary.json").write_text(json.dumps(summary | {"manifest_hash": corpus}))


def test_runs_are_read_from_their_folders(tmp_path, capsys):
    table = grid()
    for i in range(len(table)):
        row = (table.params[i], table.tokens[i], table.loss[i])
        workdir(tmp_path / "runs" / f"run{i:02d}", *row)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text('{"status": "failed"}')
    command = ["fit", str(tmp_path / "runs"), "--bootstrap=40", f"--workdir={tmp_path / 'out'}"]
    assert cli.main([*command, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["alpha"] == pytest.approx(TRUTH["alpha"], rel=1e-4)
    assert out["left_out"] == ["broken: failed"]
    assert cli.main([*command, "--law=sparse_attention"]) == 2
    assert "they do not say 'keys'" in capsys.readouterr().err
    assert cli.main([*command, "--law=joint"]) == 2
    assert "expansion: is the same in all runs" in capsys.readouterr().err
    workdir(tmp_path / "runs" / "other", 1e8, 1e9, 3.0, corpus="d")
    assert cli.main(command) == 2
    assert "different corpora: c, d" in capsys.readouterr().err
