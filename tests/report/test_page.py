"""The run page: its numbers are the inputs, it stands alone, and it survives broken workdirs."""

import json
import re
import shlex

import numpy as np
import pytest

from sparse_pretrain.report import advice, charts, page, workdir, write_report


def test_headline_numbers_are_the_inputs(tmp_path, fake_run, report):
    made = fake_run.write(tmp_path / "run")
    got = report(tmp_path / "run")
    summary, derived = made["summary"], made["run"]["derived"]
    for key in ("bits_per_byte", "nats_per_token", "tokens_per_second", "tokens", "steps"):
        assert got.keyed[key] == summary[key], key
    assert got.keyed["flops"] == summary["flops"]
    assert got.keyed["wall_seconds"] == summary["wall_seconds"]
    assert got.keyed["total_params"] == derived["total_params"]
    assert got.keyed["active_params"] == derived["active_params"]
    assert got.keyed["mfu"] == made["metrics"][-1]["mfu"]
    assert got.title.startswith("quickstart")


def test_phases_are_named_where_they_begin(tmp_path, fake_run, report):
    """On the curves, as far as the run has come; a run without phases has no such line."""
    made = fake_run.write(tmp_path / "run", steps=300, done=200)
    plain = (report(tmp_path / "run").text["loss"], report(tmp_path / "run").text["optimisation"])
    assert not any("sparse" in text for text in plain)
    per_step = made["metrics"][0]["tokens"]
    rows = [
        {"name": name, "first_step": first + 1, "start_tokens": first * per_step}
        for name, first in (("base", 0), ("sparse", 100), ("later", 250))
    ]
    derived = made["run"]["derived"] | {"phases": rows}
    (tmp_path / "run" / "run.json").write_text(json.dumps(made["run"] | {"derived": derived}))
    got = report(tmp_path / "run")
    for section in ("loss", "heldout", "optimisation"):
        assert "sparse" in got.text[section]
        assert "base" not in got.text[section]
        assert "later" not in got.text[section]


def test_tables_are_the_inputs(tmp_path, fake_run, report):
    made = fake_run.write(tmp_path / "run")
    got = report(tmp_path / "run")
    header, *rows = got.tables["domains"]
    assert header[0] == "domain"
    per = made["summary"]["per_domain"]
    hardest_first = sorted(per, key=lambda d: -per[d]["bits_per_byte"])
    assert [r[0] for r in rows] == hardest_first
    assert [float(r[1]) for r in rows] == pytest.approx(
        [per[d]["bits_per_byte"] for d in hardest_first], abs=5e-5
    )
    assert per[hardest_first[0]]["nats_per_token"] in got.values["domains"]
    config = dict(got.tables["config"][1:])
    assert config["optim.lr"] == "0.002"
    assert config["model.ffn.router.kind"] == "sigmoid_bias"
    manifest = {r[0]: r[1:] for r in got.tables["manifest"]}
    assert manifest["hash"] == ["0123456789abcdef"]
    assert manifest["tools"][0] == "103"
    assert {r[0]: r[1] for r in got.tables["environment"]}["versions.jax"] == "0.12.0"


def test_a_mixtures_weights_and_losses_are_drawn(tmp_path, fake_run, report):
    """One curve a domain, the weights of its rows; without a mixture there is no such section."""
    made = fake_run.write(tmp_path / "run", steps=40)
    assert "mixture" not in report(tmp_path / "run").tables
    lines = []
    for i, row in enumerate(made["metrics"]):
        share = 0.5 + 0.01 * i
        loss = {"prose": 3 - 0.01 * i, "code": None if i % 7 == 0 else 2.0}
        lines.append(row | {"mixture": {"prose": share, "code": 1 - share}, "domain_loss": loss})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    summary = made["summary"] | {"mixture": {"prose": 0.7, "code": 0.3}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    got = report(tmp_path / "run")
    _, *rows = got.tables["mixture"]
    assert rows == [["prose", "0.8900", "0.7000"], ["code", "0.1100", "0.3000"]]
    assert "Mixture of domains" in [a["aria-label"] for t, a in got.tags if t == "svg"]
    assert {"prose", "code"} <= set(got.text["mixture"].split())


def test_loss_by_position_is_the_summarys(tmp_path, fake_run, report):
    made = fake_run.write(tmp_path / "run")
    got = report(tmp_path / "run")
    header, *rows = got.tables["positions"]
    assert header[0] == "tokens before it"
    want = made["summary"]["by_position"]
    assert [r[0] for r in rows] == ["0 to 63", "64 to 127", "128 to 255"]
    assert [float(r[1]) for r in rows] == pytest.approx(
        [b["nats_per_token"] for b in want], abs=5e-5
    )
    assert "Loss by position" in [a["aria-label"] for t, a in got.tags if t == "svg"]


@pytest.mark.parametrize("broken", [None, 3, [], [{"from": 0}], [1], [{"from": "a", "to": 2}] * 3])
def test_loss_by_position_that_is_no_such_thing_costs_its_section_only(
    tmp_path, fake_run, report, broken
):
    made = fake_run.write(tmp_path / "run")
    summary = made["summary"] | {"by_position": broken}
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    (tmp_path / "run/eval.jsonl").write_text("")
    got = report(tmp_path / "run")
    assert "positions" not in got.ids
    assert "domains" in got.ids


def test_text_is_escaped_and_kept(tmp_path, fake_run, report):
    fake_run.write(tmp_path / "run")
    got = report(tmp_path / "run")
    assert fake_run.SAMPLE in got.text["sample"]
    assert "text & <markup>" in [r[0] for r in got.tables["domains"]]
    assert "--config.optim.lr=0.004" in got.text["next"]
    assert "sparse-pretrain generate" in got.text["next"]


def test_page_stands_alone(tmp_path, fake_run, report):
    fake_run.write(tmp_path / "run")
    got = report(tmp_path / "run")
    assert not {"script", "link", "iframe"} & {t for t, _ in got.tags}
    loads = [
        v
        for _, attrs in got.tags
        for k, v in attrs.items()
        if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
    ]
    assert loads == []
    assert "@import" not in (tmp_path / "run/report.html").read_text()
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        got.tags
    )


def test_figures_keep_their_ids_apart_and_take_the_pages_colours(tmp_path, fake_run, report):
    fake_run.write(tmp_path / "run")
    got = report(tmp_path / "run")
    assert [i for i in got.ids if got.ids.count(i) > 1] == []
    assert got.refs
    assert set(got.refs) <= set(got.ids)
    figures = [a["aria-label"] for t, a in got.tags if t == "svg"]
    assert figures == [
        "Loss",
        "Held-out bits per byte",
        "Loss by position",
        "Learning rate",
        "MaxVio",
        "Expert load",
        "Throughput",
    ]
    text = (tmp_path / "run/report.html").read_text()
    assert "var(--c1)" in text
    assert "#0a0" not in text


def test_a_cpu_goes_by_its_model(tmp_path, fake_run, report):
    device = {"kind": "cpu", "platform": "cpu", "cpu": "EPYC 9", "cores": 8, "usable_cores": 2}
    fake_run.write(tmp_path / "cpu", device=device)
    fake_run.write(tmp_path / "gpu", device=device | {"kind": "H100", "platform": "gpu"})
    assert "EPYC 9, 2 cores" in report(tmp_path / "cpu").text[""]
    assert "H100" in (other := report(tmp_path / "gpu").text[""])
    assert "EPYC" not in other


def test_the_heldout_curve_is_of_one_set(tmp_path, fake_run, report):
    """The last evaluation scores more targets besides, and those are the run's result."""
    fake_run.write(tmp_path / "a")
    path = tmp_path / "a" / "eval.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    rows[-1]["between"] = {"bits_per_byte": 1.25, "nats_per_token": 2.5, "heldout_tokens": 64}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = workdir.read(tmp_path / "a")
    assert [r["bits_per_byte"] for r in run.curve[:-1]] == [r["bits_per_byte"] for r in rows[:-1]]
    assert run.curve[-1]["bits_per_byte"] == 1.25
    assert "heldout" in report(tmp_path / "a").ids
    page = report(tmp_path / "a")
    assert page.keyed["bits_per_byte"] == rows[-1]["bits_per_byte"] != 1.25
    assert "scored on the same 64 tokens" in page.text["heldout"]  # why curve and result differ


def test_same_files_same_page(tmp_path, fake_run):
    fake_run.write(tmp_path / "run")
    first = write_report(tmp_path / "run").read_bytes()
    assert write_report(tmp_path / "run").read_bytes() == first


def test_time_is_split_without_remainder(tmp_path, fake_run, report):
    made = fake_run.write(tmp_path / "run")
    parts = page.split_time(workdir.read(tmp_path / "run"))
    tokens = 32 * 256
    stepping = sum(tokens / r["tokens_per_second"] for r in made["metrics"])
    assert parts["training steps"] == pytest.approx(stepping)
    assert parts["compilation"] == 11.5
    assert sum(parts.values()) == pytest.approx(161.25)
    assert report(tmp_path / "run").keyed["goodput"] == pytest.approx(stepping / 161.25)


def test_running_dense_and_broken_runs_have_a_page(tmp_path, fake_run, report):
    fake_run.write(tmp_path / "dense", experts=0, layers=0)
    got = report(tmp_path / "dense")
    assert "balance" not in got.ids
    assert "load" not in got.ids
    fake_run.write(tmp_path / "young", done=3, status="running")
    assert "The run is not complete" in report(tmp_path / "young").text["next"]
    fake_run.write(tmp_path / "ill")
    with open(tmp_path / "ill/metrics.jsonl", "a") as f:
        f.write('{"step": 301, "tokens": 1, "loss": null, "lr": null}\n{"step": 30')
    (tmp_path / "ill/summary.json").write_text("{")
    got = report(tmp_path / "ill")
    assert "summary.json is unreadable" in got.text[""]
    assert "1 step(s) had no finite loss" in got.text["loss"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    assert "failed" in report(empty).text[""]
    for odd in ('{"config": 3, "derived": null, "manifest": [], "argv": "x"}', "[]", ""):
        (empty / "run.json").write_text(odd)
        report(empty)
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)


def test_thin_keeps_extremes_and_order(rng):
    y = rng.normal(size=50_000)
    y[31_234], y[777] = 99.0, np.nan
    x, kept = charts.thin(np.arange(50_000.0), y)
    assert len(x) <= charts.POINTS
    assert kept.max() == 99.0
    assert kept.min() == np.nanmin(y)
    assert (np.diff(x) > 0).all()
    assert (y[x.astype(int)] == kept).all()


def test_smooth_follows_a_constant_and_skips_nan():
    y = np.full(300, 2.5)
    y[[0, 10]] = np.nan
    out = charts.smooth(y, 20)
    assert np.isnan(out[[0, 10]]).all()
    assert np.nanmax(np.abs(out - 2.5)) < 1e-12
    step = np.r_[np.zeros(200), np.ones(200)]
    # an exponential mean of span n has covered 1 - (1 - 1/n)^n of a jump after n rows
    assert charts.smooth(step, 20)[219] == pytest.approx(1 - (1 - 1 / 20) ** 20)


def test_advice_names_keys_that_exist(tmp_path, fake_run):
    fake_run.write(tmp_path / "a")
    rows = [json.loads(x) for x in (tmp_path / "a/moe.jsonl").read_text().splitlines()]
    rows[-1] |= {"max_vio": [0.1, 2.5, 0.2], "dead_experts": [0, 3, 1]}
    (tmp_path / "a/moe.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = advice.suggest(workdir.read(tmp_path / "a"))
    why = " ".join(f.why for f in found)
    assert "4 expert(s) got no token" in why
    assert "MoE layer 1 carries 3.5 times" in why
    balance = next(f.command for f in found if "even share" in f.why)
    assert "--config.model.ffn.router.rate=0.002" in balance
    assert balance.endswith(f"--workdir={tmp_path}/a-balance")
    known = set(workdir.dotted(fake_run.CONFIG))
    for f in found:
        assert set(re.findall(r"--config\.([\w.]+)=", f.command)) <= known


def test_only_what_a_model_can_read_is_offered(tmp_path, fake_run):
    data = {"tokenizer": "bpe:4096", "seq": 64, "batch": 4}
    config = {"data": {"source": "text_folder:x", **data}, "sample": {"prompt": "It's "}}
    fake_run.write(tmp_path / "text", config=config)
    found = {f.why: f.command for f in advice.suggest(workdir.read(tmp_path / "text"))}
    written = shlex.split(found["Write with the model."])
    assert written[1:] == ["generate", f"--workdir={tmp_path / 'text'}", "--prompt=It's "]
    fake_run.write(tmp_path / "task", config={"data": {"source": "synthetic:copy", **data}})
    told = [f.command for f in advice.suggest(workdir.read(tmp_path / "task"))]
    assert told
    assert not [c for c in told if "generate" in c or "--text" in c]


def test_learning_rate_that_blew_up_is_halved(tmp_path, fake_run):
    fake_run.write(tmp_path / "a", done=20, status="failed", error="ValueError\nloss is nan")
    with open(tmp_path / "a/metrics.jsonl", "a") as f:
        f.write('{"step": 21, "loss": null}\n')
    run = workdir.read(tmp_path / "a")
    assert (run.status, run.cause) == ("failed", "loss is nan")
    first = advice.suggest(run)[0]
    assert "not finite at step 21" in first.why
    assert "--config.optim.lr=0.001" in first.command


def test_still_falling_measures_gain_per_doubling(tmp_path, fake_run):
    fake_run.write(tmp_path / "a", steps=1000)
    path = tmp_path / "a/metrics.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    for r in rows:
        r["loss"] = 5.0 - 0.3 * float(np.log2(r["tokens"]))
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = workdir.read(tmp_path / "a")
    assert advice.still_falling(run) == pytest.approx(0.3, rel=0.05)
    # a rate that decays makes the loss fall by itself: that part is not measured
    for i, r in enumerate(rows):
        r["lr"] = 0.01 * min(1.0, (i + 1) / 50, 2 * (1 - i / 1000))
        r["loss"] -= 2.0 * max(0, i - 500) / 500
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = workdir.read(tmp_path / "a")
    assert 500 <= advice.before_decay(run) <= 506
    assert advice.still_falling(run) == pytest.approx(0.3, rel=0.15)
    why = next(s.why for s in advice.suggest(run) if "falling" in s.why)
    assert "at the end of the peak rate" in why


def falling(path, fake_run, **derived):
    """A run whose loss still falls, trained with a length and a source of its own."""
    made = fake_run.write(path, steps=300)
    argv = ["sparse-pretrain", "train", "--data", "python_stdlib", "--config.tokens=2457600"]
    record = made["run"] | {"argv": [*argv, "--quiet", "--workdir=x"]}
    record["derived"] |= derived
    (path / "run.json").write_text(json.dumps(record))
    found = advice.suggest(workdir.read(path))
    return next(f for f in found if "still falling" in f.why)


def test_train_longer_as_far_as_the_corpus_goes(tmp_path, fake_run):
    longer = falling(tmp_path / "a", fake_run, train_tokens=300 * 32 * 256 * 2)
    assert longer.command == (
        "sparse-pretrain train --data python_stdlib --quiet --config.steps=600 "
        f"--workdir={tmp_path}/a-longer"
    )
    larger = falling(tmp_path / "b", fake_run, train_tokens=300 * 32 * 256 * 2 - 1)
    assert larger.command == (
        "sparse-pretrain train --quiet --config.steps=600 "
        f"--config.data.source=python_packages --workdir={tmp_path}/b-packages"
    )
    assert "larger corpus (this one holds 4.92M)" in larger.why


def test_goodput_of_the_summary_is_the_one_shown(tmp_path, fake_run, report):
    made = fake_run.write(tmp_path / "run")
    summary = made["summary"] | {"goodput": 0.5}
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    got = report(tmp_path / "run")
    assert got.keyed["goodput"] == pytest.approx(0.5)
    assert sum(page.split_time(workdir.read(tmp_path / "run")).values()) == pytest.approx(161.25)


@pytest.mark.parametrize(("names", "below"), [(charts.MANY, False), (charts.MANY + 1, True)])
def test_a_long_legend_stands_under_the_plot(names, below):
    """The figure grows by the legend's height; a short one stays among the curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    chart = charts.Chart(x="step", panels=["loss"], height=2.5)
    for i in range(names):
        chart.line([0, 1], [i, i + 1], label=f"arm {i}")
    height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', chart.svg("curves")).group(1))
    assert (height > 2.5 * 72 + 30) == below
    legend, axes = chart.axes[0].get_legend(), chart.axes[0]
    box = legend.get_tightbbox(FigureCanvasAgg(chart.figure).get_renderer())
    assert (box.y1 < axes.get_window_extent().y0) == below
