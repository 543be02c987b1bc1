"""Phases as configuration: what they inherit, which step each begins at, and what is refused."""

import pytest

from sparse_pretrain import config, phases
from sparse_pretrain.commands import config as command

ATTENTION = {"kind": "full", "heads": 2, "rope": {"theta": 500.0}}
BASE = {
    "name": "base",
    "steps": 10,
    "data": {"seq": 32, "batch": 8},
    "model": {
        "width": 32,
        "blocks": {"b": {"attention": ATTENTION, "ffn": {"kind": "dense", "hidden": 16}}},
        "pattern": ["b"],
        "repeats": 2,
    },
    "optim": {"kind": "muon"},
    "phases": {
        "near": {"start": 0.3, "attention": {"b": {"kind": "moba", "block": 8}}},
        "far": {"start": 0.9, "seq": 16},
    },
}


def build(*overrides, **sections):
    return config.from_config_dict(config.SCHEMA.override(BASE | sections, overrides))


def test_a_phase_is_what_differs_from_the_run_and_not_from_a_kinds_defaults():
    experiment = build("model.blocks.b.attention.rope.factor=2")
    section = experiment.phases["near"].attention["b"]
    assert (section.KIND, section.block, section.heads) == ("moba", 8, 2)
    assert (section.rope.theta, section.rope.factor) == (500.0, 2.0)
    assert config.from_config_dict(experiment.to_dict()) == experiment
    base, near, far = experiment.stages(10)
    assert base.model == far.model == experiment.model
    assert near.model.blocks["b"].attention == section
    assert [s.seq for s in (base, near, far)] == [32, 32, 16]


def test_one_key_of_a_phase_can_be_set():
    experiment = build("phases.near.attention.b.top_k=2", "phases.far.lr=0.5")
    assert experiment.phases["near"].attention["b"].top_k == 2
    assert experiment.phases["far"].lr == 0.5
    sliding = build("phases.near.attention.b.kind=sliding", "phases.near.attention.b.sinks=false")
    assert sliding.phases["near"].attention["b"].KIND == "sliding"


@pytest.mark.parametrize("steps", [7, 10, 97])
def test_a_step_belongs_to_the_last_phase_that_started_before_its_first_token(steps):
    starts = {"a": 0.1, "b": 512.0, "c": 700.0, "d": 0.75}
    experiment = build(steps=0, phases={k: {"start": v} for k, v in starts.items()})
    found = experiment.stages(steps)
    tokens = {k: v * steps * 256 if v < 1 else v for k, v in starts.items()}
    for n in range(1, steps + 1):
        begun = {k: t for k, t in tokens.items() if t <= (n - 1) * 256 + 1e-3}
        expected = max(begun, key=begun.__getitem__, default=phases.BASE)
        assert phases.at(found, n).name == expected, n
    assert sum(s.steps for s in found) == steps


def test_a_phase_at_the_start_replaces_the_configuration_itself():
    found = build(phases={"all": {"start": 0, "seq": 8}}).stages(10)
    assert [(s.name, s.first, s.steps) for s in found] == [("all", 0, 10)]
    assert [s.name for s in build(phases={}).stages(10)] == [phases.BASE]


def test_the_rates_schedule_ends_where_the_last_weight_moves():
    steps = [(s.train, s.steps) for s in STAGES]
    assert [train for train, _ in steps] == ["all", "prices", "indexer", "prices"]
    assert phases.learning(STAGES) == sum(n for _, n in steps[:3])  # a pause within it counts
    assert phases.learning(STAGES[:1]) == steps[0][1]


STAGES = tuple(
    phases.Stage(f"{i}", first, count, None, 32, train, 1.0)
    for i, (train, first, count) in enumerate(
        [("all", 0, 5), ("prices", 5, 2), ("indexer", 7, 4), ("prices", 11, 9)]
    )
)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["phases.near.start=0.9"], ["config.phases.", ".start: 0.9", "same step", "9 of 10"]),
        (["phases.near.start=2560"], ["config.phases.near.start: 2560", "10 steps of 256 tokens"]),
        (["phases.near.start=200"], ["config.phases.near.start: 200 tokens", "256 tokens"]),
        (["phases.near.start=-1"], ["config.phases.near.start", "0 or more, got -1"]),
        (["phases.near.seq=12"], ["config.phases.near.seq: 12 does not divide data.seq 32"]),
        (["phases.near.seq=1"], ["config.phases.near.seq", "at least 2 tokens, got 1"]),
        (["phases.near.lr=0"], ["config.phases.near.lr: must be positive, got 0"]),
        (["phases.near.train=indxer"], ["config.phases.near.train", "did you mean indexer?"]),
        (["phases.near.train=indexer"], ["config.phases.near.train: 'indexer'", "kinds moba"]),
        (["phases.near.train=prices"], ["config.phases.near.train: 'prices'", "routers none"]),
        (["phases.nera.lr=1"], ["config.phases.nera: unknown key; did you mean"]),
        (["phases.near.attention.b.kind=mobba"], ["near.attention.b.kind", "did you mean moba?"]),
        (["phases.near.attention.b.heads=4"], ["config.phases.near.attention.b: its parameters",
                                               "k_norm.scale is [Dh=8] here and [Dh=16]", "heads"]),
        (["phases.near.attention.b.kind=mla"], ["config.phases.near.attention.b", "[none] here"]),
        (["phases.near.attention.b.kind=sliding"], ["near.attention.b", "sinks is [H=2] here"]),
        (["phases.near.attention.b.heads=5"], ["config.phases.near.attention.b.heads: width 32"]),
        (["model.blocks.b.attention.softcap=5"], ["phases.near.attention.b.softcap", "got 5"]),
        (["phases.near.attention.b.rope.factor=2", "phases.near.attention.b.rope.original=8"],
         ["config.data.seq: 32 tokens", "the 16 that phases.near.attention.b.rope"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_line(overrides, parts):
    with pytest.raises(ValueError) as e:
        build(*overrides)
    text = str(e.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"base": {"start": 0.5}}, "config.phases: a phase's name is letters"),
        ({"a.b": {"start": 0.5}}, "got 'a.b'"),
        ({"a": {}}, "config.phases.a.start: required"),
        ({"a": 3}, "config.phases.a: expected a section"),
        (["a"], "config.phases: expected a section"),
        ({"a": {"start": 0.5, "attention": ["b"]}}, "phases.a.attention: expected a section"),
        ({"a": {"start": 0.5, "attention": {"b": 1}}}, "phases.a.attention.b: expected a section"),
        ({"a": {"start": 0.5, "attention": {"c": {"kind": "moba"}}}}, "a.attention.c: the model"),
    ],
)
def test_what_is_no_phase_is_refused(given, part):
    with pytest.raises(ValueError) as e:
        build(phases=given)
    assert part in str(e.value), e.value


def test_rows_that_a_phase_cuts_may_be_longer_than_its_rotation_reaches():
    rope = {"factor": 2.0, "original": 8}
    phase = {"start": 0.5, "seq": 16, "attention": {"b": {"rope": rope}}}
    assert build(phases={"short": phase}).stages(10)[1].seq == 16


def test_a_run_that_knows_its_length_from_the_data_checks_its_phases_then():
    experiment = build(steps=0, phases={"late": {"start": 2560}})
    with pytest.raises(ValueError, match=r"^config.phases.late.start: 2560 is not before"):
        config.complete(experiment, vocab=300, train_tokens=2600)
    config.complete(experiment, vocab=300, train_tokens=2900)


def test_costs_are_sums_over_phases():
    said = command.costs(build("model.vocab=64"))
    base, near, far = (row["train_flops_per_token"] for row in said["phases"])
    plain = command.costs(build("model.vocab=64", phases={}))
    assert "phases" not in plain
    assert base == plain["train_flops_per_token"]
    assert said["flops"] == pytest.approx(256 * (3 * base + 6 * near + far), rel=1e-12)
    assert far < base
    unknown = command.costs(build("model.vocab=64", steps=0))
    assert unknown["flops"] is None
