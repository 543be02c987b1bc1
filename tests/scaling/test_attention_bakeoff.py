"""The attention bake-off: what its arms read, and what its collector says of runs."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sparse_pretrain import attention, config, sections
from sparse_pretrain.attention import base
from sparse_pretrain.config import load as load_config
from sparse_pretrain.scaling import children

HOME = Path(__file__).parents[2] / "experiments"
FILE = HOME / "attention_bakeoff.py"


def module(path):
    spec = importlib.util.spec_from_file_location(f"shipped_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


BAKEOFF, COLLECT = module(FILE), module(HOME / "results" / "collect_attention.py")
KNOWN = [arm for arm in BAKEOFF.ARMS if arm in attention.TABLE]


@pytest.mark.parametrize("arm", BAKEOFF.ARMS)
def test_arms_read_a_quarter_or_are_references(arm):
    settings = BAKEOFF.ARMS[arm]
    reads = BAKEOFF.touched(settings["kind"], settings, BAKEOFF.SEQ)
    assert 0 < reads <= BAKEOFF.SEQ
    assert (reads == BAKEOFF.SEQ) == (arm in ("full", "mla"))
    assert (reads <= BAKEOFF.SEQ // 4) == (arm not in ("full", "mla"))


def last_row(kind, settings, length):
    """Keys of the last query, one by one, by the definition of each variant."""
    at, s = length - 1, settings
    window = sum(at - key < s["window"] for key in range(length)) if "window" in s else 0
    if kind in ("csa", "hca"):
        whole = sum((i + 1) * s["ratio"] <= length for i in range(length))
        return window + (min(whole, s["top"]) if kind == "csa" else whole)
    if kind == "dsa":
        return len(range(length)[: s["top"]])
    entries = [i for i in range(length) if i * s["stride"] + s["span"] <= length]
    chosen = [key for key in range(length) if key // s["block"] < s["top_k"]]
    return len(entries) + len(chosen) + window


@pytest.mark.parametrize("length", [96, 128])
@pytest.mark.parametrize("kind", ["nsa", "dsa", "csa", "hca"])
def test_touched_is_a_count_of_keys(kind, length):
    settings = dict(window=20, ratio=4, top=9, span=8, stride=4, block=8, top_k=3)
    assert BAKEOFF.touched(kind, settings, length) == last_row(kind, settings, length)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("full", {}), ("sliding", {"window": 24, "sinks": False}), ("moba", {"block": 8, "top_k": 3})],
)
def test_touched_is_what_the_variants_see(kind, settings):
    section = attention.TABLE[kind].Config(heads=1, head_dim=4, **settings)
    ones = jnp.ones((1, 48), jnp.int32)
    context = base.Context(ones, jnp.arange(48, dtype=jnp.int32)[None])
    if kind == "moba":
        variant = object.__new__(attention.TABLE[kind])
        object.__setattr__(variant, "config", section)
        q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 48, 1, 4)), jnp.float32)
        seen = attention.TABLE[kind].seen(variant, q, q, context)[0, 0]
    else:
        seen = attention.TABLE[kind].mask(section, context)[0]
    assert int(seen[-1].sum()) == BAKEOFF.touched(kind, settings, 48)


@pytest.mark.parametrize("arm", KNOWN)
def test_arms_differ_in_their_attention_and_rate_only(arm):
    experiment = config.resolve(f"{FILE}:{arm}")
    other = config.resolve(str(FILE))
    block = experiment.model.blocks["dense"].attention
    assert block.KIND == arm
    flat = [sections.flat(e.to_dict()) for e in (experiment, other)]
    same = [
        {k: v for k, v in f.items() if ".attention." not in k and k not in ("name", "optim.lr")}
        for f in flat
    ]
    assert same[0] == same[1]


def test_an_unknown_arm_names_the_known():
    with pytest.raises(ValueError, match="'fulll' is not one of full, sliding, moba"):
        load_config(FILE, "fulll")


@pytest.mark.parametrize("name", ["attention_bakeoff", "attention_bakeoff_lr"])
def test_sweeps_hold_every_arm_that_there_is_equally_often(name, tmp_path):
    found = children.children(HOME / "sweeps" / f"{name}.py", tmp_path)
    arms = [c.config.rpartition(":")[2] for c in found]
    assert sorted(set(arms)) == sorted(KNOWN)
    assert len({arms.count(arm) for arm in arms}) == 1
    seeds = {c.overrides["seed"] for c in found}
    assert seeds == ({100} if name.endswith("lr") else set(range(5)))


def write(root, arm, seed, far, *, near=3.0, pace=1000.0, lr=0.02):
    path = root / f"{arm}-{seed}-{lr}"
    path.mkdir(parents=True)
    run = {
        "config": {"name": f"attention_bakeoff_{arm}", "seed": seed, "optim": {"lr": lr},
                   "model": {"blocks": {"dense": {"attention": {"kind": arm}}}}},
        "derived": {"train_flops_per_token": 1e6, "executed_flops_per_token": 2e6},
        "commit": "a1b2",
    }  # fmt: skip
    buckets = [{"from": 0, "to": 1024, "nats_per_token": near, "tokens": 300}]
    for start, end, more, tokens in ((1024, 2048, 0.1, 100), (2048, 4096, -0.1, 100)):
        row = {"from": start, "to": end, "nats_per_token": far + more, "tokens": tokens}
        buckets.append(row)
    summary = {
        "bits_per_byte": (3 * near + 2 * far) / 10, "nats_per_token": near, "tokens": 600,
        "tokens_per_second": pace, "total_params": 10, "by_position": buckets,
        "manifest_hash": "f" * 16,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(run))
    (path / "summary.json").write_text(json.dumps(summary))


def test_the_collector_applies_the_rule(tmp_path, capsys):
    rng = np.random.default_rng(0)
    level = rng.normal(2.0, 0.1, 5)  # a seed's own, shared by its arms
    noise = {arm: rng.normal(0.0, 0.002, 5) for arm in ("full", "sliding", "moba", "nsa")}
    means = {"full": 0.0, "sliding": 0.1, "moba": 0.01, "nsa": 0.06}
    far = {arm: level + means[arm] + noise[arm] for arm in means}
    for arm, values in far.items():
        for seed, value in enumerate(values):
            write(tmp_path, arm, seed, float(value), pace=1000.0 * (1 + (arm != "full")))
    result = COLLECT.compared(COLLECT.rows(tmp_path))
    table = {line["arm"]: line for line in result["table"]}
    want = scipy.stats.ttest_rel(far["sliding"], far["full"])
    assert result["gap"]["mean"] / result["gap"]["standard_error"] == pytest.approx(want.statistic)
    assert result["gap"]["long_range"]
    for arm, verdict in (("moba", "met"), ("nsa", "missed")):
        share = (far["sliding"] - far[arm]).mean() / (far["sliding"] - far["full"]).mean()
        assert table[arm]["recovered"]["share"] == pytest.approx(share)
        assert table[arm]["recovered"]["verdict"] == verdict
        assert table[arm]["pace"] == pytest.approx(2.0)
        d = table[arm]["far_to_full"]
        ends = scipy.stats.ttest_rel(far[arm], far["full"]).confidence_interval(0.95)
        assert (d["low"], d["high"]) == pytest.approx((ends.low, ends.high))
    COLLECT.show(result)
    out = capsys.readouterr().out
    assert "moba: recovers" in out
    assert "80 % met" in out
    assert "80 % missed" in out


def test_no_gap_leaves_the_question_to_the_recall_tasks(tmp_path):
    for seed, (full, sliding) in enumerate([(2.0, 2.05), (2.1, 2.05), (2.05, 2.07)]):
        write(tmp_path, "full", seed, full)
        write(tmp_path, "sliding", seed, sliding)
        write(tmp_path, "moba", seed, full)
    result = COLLECT.compared(COLLECT.rows(tmp_path))
    assert not result["gap"]["long_range"]
    assert all("recovered" not in line for line in result["table"])
    assert "no long range" in COLLECT.verdicts(result)[-1]
    tie = next(line for line in result["table"] if line["arm"] == "sliding")["far_to_full"]
    assert COLLECT.shown(tie).endswith("tie")


def test_of_rates_the_best_of_each_arm_is_told(tmp_path, capsys):
    for arm, losses in (("full", (2.2, 2.0, 2.1)), ("moba", (2.0, 2.1, 2.2))):
        for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True):
            write(tmp_path, arm, 100, 2.0, near=loss, lr=lr)
    assert COLLECT.rates(COLLECT.rows(tmp_path)) == {"full": 0.02, "moba": 0.01}
    full, moba = capsys.readouterr().out.splitlines()
    assert "best 0.02, inside" in full
    assert "AT THE EDGE" in moba
