"""The comparison page: order, pairs and verdicts equal what numpy and scipy say of the inputs."""

import math

import pytest
import scipy.stats

from sparse_pretrain.report import compare, workdir


@pytest.fixture
def arm(tmp_path, fake_run):
    def make(name, bits, **kwargs):
        runs = {}
        for seed, value in bits.items():
            path = tmp_path / f"{name}-{seed}"
            fake_run.write(path, steps=60, seed=seed, bits=value, **kwargs)
            runs[seed] = workdir.read(path)
        return compare.Arm(name, runs)

    return make


BASE = {0: 2.10, 1: 2.14, 2: 2.12, 3: 2.20}
BETTER = {0: 2.05, 1: 2.10, 2: 2.06, 3: 2.15}
SAME = {0: 2.14, 1: 2.10, 2: 2.13, 3: 2.18}


def test_page_ranks_and_pairs(tmp_path, arm, parse):
    arms = [arm("base", BASE), arm("same & <so>", SAME), arm("better", BETTER)]
    out = compare.write_comparison(arms, tmp_path / "comparison.html", "Three arms")
    got = parse(out.read_text(encoding="utf-8"))
    assert got.title.startswith("Three arms")
    ranking = got.tables["ranking"][1:]
    assert [r[1] for r in ranking] == ["better", "same & <so>", "base"]
    assert [float(r[2]) for r in ranking] == pytest.approx([2.09, 2.1375, 2.14], abs=5e-5)
    half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(list(BETTER.values()))
    assert float(ranking[0][3].removeprefix("± ")) == pytest.approx(half, abs=5e-5)
    paired = {r[0]: r[1:] for r in got.tables["paired"][1:]}
    assert paired["better"][0] == "lower"
    assert paired["same & <so>"][0] == "tie"
    want = scipy.stats.ttest_rel(list(BETTER.values()), list(BASE.values()))
    low, high = want.confidence_interval(0.95)
    assert float(paired["better"][1]) == pytest.approx(-0.05, abs=5e-5)
    assert [float(x) for x in paired["better"][2].split(" to ")] == pytest.approx(
        [low, high], abs=5e-5
    )
    assert low in [pytest.approx(v, rel=1e-9) for v in got.values["paired"]]
    assert len(got.tables["runs"]) == 1 + 12
    assert {"metrics-curve", "eval-curve", "domains", "positions"} <= set(got.ids)
    assert "settings" not in got.ids  # the arms differ in nothing but their seeds


def test_answers_of_tasks_are_ranked_and_drawn_beside_the_loss(tmp_path, arm, parse):
    arms = [arm("base", BASE), arm("better", BETTER)]
    for n, run in enumerate(arms[1].runs.values()):
        run.summary["accuracy"] = 0.5 + 0.1 * n
        for k, row in enumerate(run.eval):
            row["accuracy"] = 0.1 * k
    out = compare.write_comparison(arms, tmp_path / "comparison.html")
    got = parse(out.read_text(encoding="utf-8"))
    header, better, base = got.tables["ranking"][:3]
    column = header.index("held-out accuracy")
    assert float(better[column]) == pytest.approx(0.65)
    assert base[column] == "-"
    assert "accuracy-curve" in got.ids
    plain = compare.write_comparison(arms[:1], tmp_path / "plain.html")
    assert "accuracy" not in plain.read_text(encoding="utf-8")


def test_pairs_need_equal_seed_corpus_and_an_end(arm):
    base = arm("base", BASE)
    other = arm("other", {1: 2.0, 2: 2.1, 7: 2.0})
    broken = arm("broken", {0: 2.0, 1: 2.0}, status="interrupted")
    foreign = arm("foreign", {0: 1.0, 1: 1.0}, manifest_hash="f" * 16)
    found = {d.arm: d for d in compare.differences([base, other, broken, foreign])}
    assert found["other"].seeds == (1, 2)
    assert found["other"].paired.mean == pytest.approx(((2.0 - 2.14) + (2.1 - 2.12)) / 2)
    assert found["broken"].seeds == ()
    assert found["broken"].paired is None
    assert found["foreign"].seeds == ()
    assert broken.mean() == math.inf
    assert [a.name for a in compare.rank([broken, base])] == ["base", "broken"]


def test_page_says_what_differs_and_warns(tmp_path, arm, parse):
    arms = [
        arm("low", {0: 2.0}, config={"optim": {"lr": 0.001}}),
        arm("high", {0: 2.1}, config={"optim": {"lr": 0.004}}, manifest_hash="f" * 16),
        arm("gone", {0: 2.1}, status="failed", error="loss is not finite"),
    ]
    out = compare.write_comparison(arms, tmp_path / "c.html")
    got = parse(out.read_text(encoding="utf-8"))
    header, *rows = got.tables["settings"]
    column = header.index("optim.lr")
    assert {r[0]: r[column] for r in rows} == {"low": "0.001", "high": "0.004", "gone": "0.002"}
    assert "different corpora" in got.text[""]
    assert "paired" not in got.ids
    assert ["gone", "0", "failed"] == got.tables["runs"][-1][:3]
    assert got.tables["runs"][-1][-1] == "loss is not finite"


def test_mistakes(tmp_path, arm):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare.write_comparison([], tmp_path / "c.html")
    one = arm("one", {0: 2.0})
    with pytest.raises(ValueError, match="two are named 'one'"):
        compare.write_comparison([one, one], tmp_path / "c.html")


def test_arms_without_any_file_still_have_a_page(tmp_path, parse):
    arm = compare.Arm("nothing yet", {0: workdir.read(tmp_path / "absent")})
    out = compare.write_comparison([arm], tmp_path / "c.html")
    got = parse(out.read_text(encoding="utf-8"))
    assert got.tables["ranking"][1][:3] == ["-", "nothing yet", "-"]
