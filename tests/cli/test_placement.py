"""`placement` on recorded loads: the table, the page, the numbers for programs, every mistake."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from sparse_pretrain import cli
from sparse_pretrain.report import placement as report
from sparse_pretrain.report import workdir
from sparse_pretrain.sharding import policies, traces

FFN = {"kind": "moe", "experts": 16, "top_k": 2, "hidden": 32, "router": {"groups": 4}}
CONFIG = {
    "name": "skewed",
    "optim": {"kind": "adamw"},
    "model": {
        "width": 64,
        "prefix": ["first"],
        "pattern": ["moe"],
        "repeats": 3,
        "dtype": "bfloat16",
        "blocks": {"first": {"ffn": {"kind": "dense", "hidden": 64}}, "moe": {"ffn": FFN}},
    },
}
SIZE = 3 * 64 * 32  # parameters of one expert
FLOPS = 3 * 3 * 2 * SIZE * 2  # per token of 3 layers, 2 experts each, forward and backward


@pytest.fixture
def skewed(tmp_path):
    """A run with uneven loads."""
    path = tmp_path / "skewed"
    path.mkdir()
    record = {"name": "skewed", "status": "finished", "config": CONFIG}
    record["derived"] = {"train_flops_per_token": 4.0 * FLOPS}
    (path / "run.json").write_text(json.dumps(record))
    load = traces.zipf(steps=12, layers=3, experts=16, pairs=4000, exponent=1.0)
    rows = [{"step": i + 1, "load": x.astype(float).tolist()} for i, x in enumerate(load)]
    (path / "moe.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs a command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = cli.main(["placement", *argv])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_the_table_and_the_page(command, skewed):
    code, out, err = command(f"--trace={skewed}", "--window=4")
    assert (code, err) == (0, "")
    assert "skewed: 16 experts in 24 slots on 8 devices" in out
    for name in policies.TABLE:
        assert f"{name} " in out
    assert "simulated: experts are 25 % of a step, from the run's FLOPs" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "page:" not in line)
    text = (skewed / "placement.html").read_text()
    assert text.count("<svg") == 4
    for part in ("simulated", "Imbalance over time", "Devices before and after", *policies.TABLE):
        assert part in text
    assert "http" not in text.replace("http://www.w3.org", "")  # asks no network


def test_the_numbers_for_programs(command, skewed, tmp_path):
    page = tmp_path / "new" / "page.html"
    options = (f"--trace={skewed}", "--window=4", "--devices=4", "--policy=eplb,row_budget")
    code, out, err = command(*options, f"--out={page}", "--json")
    assert (code, err) == (0, "")
    got = json.loads(out)
    assert list(got["policies"]) == ["none", "eplb", "row_budget"]  # beside no re-placement
    assert page.is_file()
    assert not (skewed / "placement.html").exists()
    load = traces.from_rows(workdir.read(skewed).moe)
    setting = policies.Setting(experts=16, devices=4, slots=20)
    plain, eplb, rows = (
        policies.replay(load, policies.TABLE[n], setting, 4) for n in got["policies"]
    )
    assert got["slots"] == 20
    assert got["policies"]["eplb"]["max_over_mean"] == eplb.ratio.mean()
    assert got["policies"]["none"]["worst"] == plain.ratio.max()
    gain = (0.75 + 0.25 * plain.ratio.mean()) / (0.75 + 0.25 * eplb.ratio.mean()) - 1
    assert got["policies"]["eplb"]["simulated_gain"] == pytest.approx(gain)
    assert got["policies"]["eplb"]["moved_weight_bytes"] == eplb.moved.sum() / 2 * 2 * SIZE
    # master weights and two moments, float32
    assert got["policies"]["eplb"]["moved_state_bytes"] == eplb.rehomed.sum() / 2 * 12 * SIZE
    fetched = rows.fetched.sum() / 8 * 2 * SIZE
    assert got["policies"]["row_budget"]["fetched_bytes_per_step"] == fetched > 0
    assert got["policies"]["row_budget"]["moved_weight_bytes"] == 0


def test_groups_stay_on_their_nodes(command, skewed):
    options = (f"--trace={skewed}", "--window=4", "--devices=4", "--json", "--policy=eplb")
    grouped, free = (json.loads(command(*options, f"--nodes={n}")[1]) for n in (2, 1))
    assert grouped["groups"] == 4
    # fewer choices, so no better balance is to be had on average
    assert grouped["policies"]["eplb"]["max_over_mean"] > free["policies"]["eplb"]["max_over_mean"]
    # a router without groups: EPLB places as if there were one node, and the table says so
    plain = json.loads(json.dumps(CONFIG))
    plain["model"]["blocks"]["moe"]["ffn"]["router"] = {}
    record = json.loads((skewed / "run.json").read_text()) | {"config": plain}
    (skewed / "run.json").write_text(json.dumps(record))
    out = command(*[o for o in options if o != "--json"], "--nodes=2")[1]
    assert "1 group of experts: placed as if on one node" in out


def test_a_run_that_does_not_say_what_experts_cost(command, skewed):
    (skewed / "run.json").write_text('{"name": "bare", "status": "finished"}')
    code, out, err = command(f"--trace={skewed}", "--window=4", "--policy=eplb")
    assert (code, err) == (0, "")
    assert "experts are 50 % of a step, assumed" in out
    _, out, _ = command(f"--trace={skewed}", "--window=4", "--expert-share=0.8", "--policy=eplb")
    assert "experts are 80 % of a step, as given" in out


def test_costs_of_the_quickstart_are_those_of_the_planner():
    from sparse_pretrain import config
    from sparse_pretrain.planning import flops

    full = config.resolve("experiments/quickstart.py").to_dict()
    experiment = config.from_config_dict(full)
    step = flops.train_flops_per_token(experiment.model, 256).model
    run = workdir.Run(
        path=Path(), run={"config": full, "derived": {"train_flops_per_token": step}},
        summary={}, metrics=[], eval=[], moe=[], status="", cause="",
    )  # fmt: skip
    got = report.costs(run)
    ffn = experiment.model.blocks["moe"].ffn
    fewer = dataclasses.replace(ffn, top_k=ffn.top_k - 1)
    blocks = {**experiment.model.blocks}
    blocks["moe"] = dataclasses.replace(blocks["moe"], ffn=fewer)
    less = flops.train_flops_per_token(dataclasses.replace(experiment.model, blocks=blocks), 256)
    np.testing.assert_allclose(got.share * step, ffn.top_k * (step - less.model))
    assert got.weight_bytes == 2 * 3 * 256 * 192
    assert got.state_bytes == 4 * 2 * 3 * 256 * 192  # master weights and Muon's one moment


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--trace=nowhere"], ["--trace: 'nowhere' holds no run", "train` makes one"]),
        ([], ["--trace"]),
        (["--policy=eplp"], ["--policy: unknown policy 'eplp'; did you mean eplb?"]),
        (["--policy="], ["--policy: unknown policy ''"]),
        (["--devices=5"], ["devices: 16 experts do not divide by 5 devices"]),
        (["--devices=0"], ["--devices: 16 experts do not divide by 0 devices"]),
        (["--devices=many"], ["--devices", "'many'"]),
        (["--nodes=3"], ["--nodes: 8 devices do not divide by 3 nodes"]),
        (["--redundant=-1"], ["redundant: must not be negative, got -1.0"]),
        (["--redundant=nan"], ["redundant"]),
        (["--window=7"], ["window: 12 recorded steps are fewer than two windows of 7"]),
        (["--window=0"], ["window: must be positive, got 0"]),
        (["--expert-share=2"], ["--expert-share: must lie between 0 and 1, got 2.0"]),
        (["--out=run.json/x.html", "--window=4", "--policy=eplb"], ["run.json"]),
        (["--windw=3"], ["unknown option '--windw'; did you mean --window?"]),
    ],
)
def test_a_mistake_is_one_line(command, skewed, monkeypatch, options, parts):
    monkeypatch.chdir(skewed)
    trace = [] if any("--trace" in o for o in options) or not options else ["--trace=."]
    code, out, err = command(*trace, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_run_without_experts(command, skewed):
    (skewed / "moe.jsonl").write_text("")
    code, _, err = command(f"--trace={skewed}")
    assert code == 2
    assert "recorded no loads: the run has no experts" in err
