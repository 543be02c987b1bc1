"""Published raw results give back the published numbers; where the files are absent, it says so."""

import pytest

from sparse_pretrain.scaling.published import (
    chinchilla,
    files,
    optimizers,
    overtraining,
    regmix,
    routed,
    schedules,
)


def have(name):
    """Skips, naming the public source, where a file is not on this machine."""
    try:
        files.find(name)
    except files.Absent as e:
        pytest.skip(str(e))


def test_b1_chinchilla():
    have("published/chinchilla/svg_extracted_data.csv")
    found = chinchilla.refit()
    assert found["dropped"] == 5
    for name in ("E", "alpha", "beta"):
        assert found[name] == pytest.approx(chinchilla.PUBLISHED[name], abs=1e-4)
    for name in ("A", "B"):
        assert found[name] == pytest.approx(chinchilla.PUBLISHED[name], rel=5e-4)
    assert round(found["tokens_per_param"], 1) == 17.9


@pytest.mark.slow  # 26 boosted fits: python3 -m pytest -m slow tests/scaling/test_published.py
def test_b2_regmix():
    pytest.importorskip("lightgbm", reason="the extra 'published' is not installed")
    have("published/regmix/train_mixture_1m.csv")
    found = regmix.refit()
    for domain, percent in regmix.PUBLISHED.items():
        assert found["by_domain"][domain]["boosted"] == pytest.approx(percent, abs=0.05)
    assert found["lowest"] == pytest.approx(regmix.LOWEST, abs=0.05)
    assert found["highest"] == pytest.approx(regmix.HIGHEST, abs=0.05)
    assert found["boosted_wins"] == found["domains"] == 13
    assert found["mean_1B"] > 90


@pytest.mark.parametrize("router", routed.ROUTERS)
def test_b3_routed_law_and_b7_as_a_planner(router):
    have("published/routed_scaling/curves.csv.gz")
    found, published = routed.refit(router), routed.PUBLISHED[router]
    for name, within in (("a", 0.002), ("b", 0.012), ("c", 0.001)):
        assert found[name] == pytest.approx(published[name], abs=within), name
    assert found["cutoff"] == pytest.approx(published["cutoff"], rel=0.2)
    forecast = routed.planner(router)
    assert len(forecast["by_size"]) == 6
    assert forecast["worst"] < 1.0


def test_b4_over_training():
    have("published/overtraining/runs.csv")
    found = overtraining.refit()["forecast"]
    for name, percent in overtraining.PUBLISHED.items():
        assert found[name]["error_percent"] == pytest.approx(percent, abs=0.001)


def test_b5_schedules():
    have("published/schedules/25M_wsd_20000_24000.csv")
    losses = schedules.final_losses()
    assert schedules.ordered(losses) == 3
    assert [round(x, 3) for x in losses["25M"].values()] == [3.277, 3.304, 3.347]


def test_b6_optimizers():
    have("published/optimizer_race/curves.csv")
    found = optimizers.race()
    for name, loss in optimizers.PUBLISHED.items():
        assert found["final"][name] == pytest.approx(loss, abs=6e-4)
    assert found["order"].index("muon") < found["order"].index("adam")
    assert 1.1 <= found["sooner"]["muon"] <= 1.7


def test_an_absent_file_names_its_public_source(tmp_path, monkeypatch):
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(files.Absent, match="mlfoundations/scaling"):
        overtraining.refit()
    path = tmp_path / "published" / "overtraining" / "runs.csv"
    path.parent.mkdir(parents=True)
    path.write_text("dataset\n")
    with pytest.raises(ValueError, match=r"sha256 begins \w{16}, that of mlfoundations"):
        overtraining.refit()


def test_a_planted_over_training_law_is_found():
    import numpy as np

    flops, ratio = np.geomspace(1e17, 1e20, 8), np.tile([20.0, 320.0], 4)
    loss = 1.7 + (300 * ratio**0.15 + 500 * ratio**-0.15) * flops**-0.15
    eta, weights, rest = overtraining.solve(flops, ratio, loss)
    assert eta == pytest.approx(0.15, abs=1e-6)
    np.testing.assert_allclose(weights, [1.7, 300, 500], rtol=1e-4)
    assert rest < 1e-9


def test_a_curve_is_crossed_between_its_points():
    curve = [(0, 4.0), (10, 3.0), (20, 2.0)]
    assert optimizers.crossing(curve, 2.75) == pytest.approx(12.5)
    assert optimizers.crossing(curve, 1.0) is None
