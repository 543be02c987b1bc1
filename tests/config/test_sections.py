"""The tree of records, with toy records: defaults by kind, strict types, overrides."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import ml_collections
import pytest

from sparse_pretrain import sections, spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(spec.Config):
    theta: float = 10000.0
    interleaved: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(spec.Config):
    KIND: ClassVar[str] = "full"
    heads: int = 4
    rope: Rope = Rope()

    def __post_init__(self):
        spec.positive(self, "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(spec.Config):
    KIND: ClassVar[str] = "latent"
    heads: int = 8
    rank: int = 64
    rope: Rope = Rope(interleaved=True)
    inner: spec.Config | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(spec.Config):
    attention: spec.Config = Full(heads=2)
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root(spec.Config):
    width: int
    lr: float = 1e-3
    rate: float | None = None
    on: bool = True
    pattern: tuple[str, ...] = ("a",)
    pair: tuple[int, int] = (1, 2)
    blocks: Mapping[str, Block] = dataclasses.field(
        default_factory=lambda: {"a": Block(), "b": Block(note="second")}
    )
    best: Block = Block()


class Table:
    def __init__(self, config):
        self.Config = config


TABLE = {"full": Table(Full), "latent": Table(Latent)}
SCHEMA = sections.Schema(Root, {"attention": TABLE, "inner": TABLE})


def fails(call, *parts):
    with pytest.raises(ValueError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_defaults_follow_the_kind_and_the_parents_default():
    full = SCHEMA.fill({"width": 8, "best": {"attention": {"kind": "latent", "rank": 3}}})
    assert full["best"]["attention"] == {
        "kind": "latent",
        "heads": 8,
        "rank": 3,
        "rope": {"theta": 10000.0, "interleaved": True},
        "inner": None,
    }
    # the parent says heads=2 where the record's own default is 4
    assert full["blocks"]["a"]["attention"]["heads"] == 2
    assert (
        SCHEMA.fill({"width": 8, "best": {"attention": {"kind": "full"}}})["best"]["attention"][
            "heads"
        ]
        == 2
    )


def test_a_partly_given_section_keeps_its_parents_other_values():
    values = {"width": 8, "best": {"attention": {"kind": "latent", "rope": {"theta": 5.0}}}}
    built = SCHEMA.build(values)
    assert built.best.attention.rope == Rope(theta=5.0, interleaved=True)


def test_built_records_describe_themselves_and_build_again():
    built = SCHEMA.build({"width": 8, "blocks": {"z": {"attention": {"kind": "latent"}}}})
    assert isinstance(built.blocks["z"].attention, Latent)
    assert list(built.blocks) == ["z"]
    assert SCHEMA.build(built.to_dict()) == built
    assert SCHEMA.build(built) == built
    assert SCHEMA.build(ml_collections.ConfigDict({"width": 8})) == SCHEMA.build({"width": 8})


def test_optional_sections():
    inner = {"kind": "latent", "inner": {"kind": "full", "heads": 1}}
    built = SCHEMA.build({"width": 8, "best": {"attention": inner}})
    assert built.best.attention.inner == Full(heads=1)
    assert SCHEMA.build(built.to_dict()) == built


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"width": 8, "widht": 1}, ["config.widht: unknown key; did you mean config.width?"]),
        ({"width": 8, "zzz": 1}, ["config.zzz: unknown key; known are width, lr"]),
        (
            {"width": 8, "best": {"attention": {"kind": "fall"}}},
            ["config.best.attention.kind: unknown kind 'fall'; did you mean full?"],
        ),
        ({"width": 8, "best": {"attention": {"kind": 3}}}, ["config.best.attention.kind", "3"]),
        (
            {"width": 8, "best": {"attention": {"kind": "full", "rank": 3}}},
            ["config.best.attention.rank: unknown key"],
        ),
        (
            {"width": 8, "best": {"attention": {"kind": "latent", "inner": {}}}},
            ["config.best.attention.inner.kind: required; one of full, latent"],
        ),
        (
            {"width": 8, "blocks": {"z": {"attention": {"heads": 0}}}},
            ["config.blocks.z.attention.heads: must be positive, got 0"],
        ),
        ({"width": "8"}, ["config.width: expected int, got str '8'"]),
        ({"width": 8.5}, ["config.width: expected int, got float 8.5"]),
        ({"width": True}, ["config.width", "bool"]),
        ({"width": 10**400}, ["config.width: must be at most 2**53"]),
        ({"width": 8, "lr": float("nan")}, ["config.lr: must be finite, got nan"]),
        ({"width": 8, "lr": float("inf")}, ["config.lr: must be finite, got inf"]),
        ({"width": 8, "lr": 1e300}, ["config.lr: 1e+300 is beyond what float32 holds"]),
        ({"width": 8, "lr": 1e-300}, ["config.lr: 1e-300 is beyond what float32 holds"]),
        ({"width": 8, "lr": None}, ["config.lr"]),
        ({"width": 8, "pattern": "abc"}, ["config.pattern: expected a list", "'abc'"]),
        ({"width": 8, "pattern": ["a", 1]}, ["config.pattern[1]: expected str, got int 1"]),
        ({"width": 8, "pair": [1]}, ["config.pair: expected 2 values, got 1"]),
        ({"width": 8, "best": 3}, ["config.best: expected a section, got int"]),
        ({"width": 8, "best": None}, ["config.best", "section"]),
        ({"width": 8, "blocks": [1]}, ["config.blocks: expected a section, got list"]),
        ({"width": 8, "blocks": {1: {}}}, ["config.blocks: keys are text, got 1"]),
        ({}, ["config.width: required and not given"]),
        (7, ["config: expected a section, got int"]),
    ],
)
def test_what_is_refused(values, parts):
    fails(lambda: SCHEMA.build(values), *parts)


def over(*overrides, **values):
    return SCHEMA.build(SCHEMA.override({"width": 8} | values, overrides))


def test_overrides_are_parsed_by_type():
    built = over(
        "width=1e1", "lr=2", "rate=0.5", "on=false", "pattern=x, y", "pair=[3,4]", "best.note=7"
    )
    assert (built.width, built.lr, built.rate, built.on) == (10, 2.0, 0.5, False)
    assert (built.pattern, built.pair, built.best.note) == (("x", "y"), (3, 4), "7")
    assert isinstance(built.width, int)
    assert isinstance(built.lr, float)
    assert over("rate=none", rate=0.5).rate is None
    assert over("pattern=").pattern == ()
    assert over("width=1_000").width == 1000
    assert over("width=1", "width=2").width == 2  # the last one wins
    assert over("best.note=a=b").best.note == "a=b"


def test_overrides_reach_into_defaults_without_losing_the_rest():
    built = over("blocks.a.attention.rope.theta=7")
    assert list(built.blocks) == ["a", "b"]
    assert built.blocks["b"].note == "second"
    assert built.blocks["a"].attention == Full(heads=2, rope=Rope(theta=7.0))


def test_overrides_leave_their_input_alone():
    values = {"width": 8, "best": {"attention": {"kind": "full", "heads": 3}}}
    SCHEMA.override(values, ["best.attention.kind=latent", "best.attention.rank=1"])
    assert values == {"width": 8, "best": {"attention": {"kind": "full", "heads": 3}}}


def test_a_new_kind_keeps_shared_keys_and_takes_its_own_defaults():
    best = {"attention": {"kind": "latent", "heads": 3, "rank": 5}}
    # given in the other order: the kind goes first all the same
    built = over("best.attention.rope.theta=9", "best.attention.kind=full", best=best)
    assert built.best.attention == Full(heads=3, rope=Rope(theta=9.0, interleaved=False))
    built = over(
        "best.attention.inner.kind=full",
        "best.attention.inner.heads=9",
        best={"attention": {"kind": "latent", "inner": {"kind": "latent", "rank": 1}}},
    )
    assert built.best.attention.inner == Full(heads=9)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("widht=1", ["config.widht: unknown key; did you mean config.width?"]),
        ("heads=1", ["config.heads: unknown key; did you mean config.blocks.a.attention.heads?"]),
        ("width.x=1", ["config.width: is a value"]),
        ("best=1", ["config.best: is a section", "--config.best.attention=VALUE"]),
        ("blocks=1", ["config.blocks: is a section", "--config.blocks.a=VALUE"]),
        ("blocks.c.note=1", ["config.blocks.c: unknown key; known are a, b"]),
        ("best.attention.kind=moe", ["config.best.attention.kind: unknown kind 'moe'"]),
        ("best.attention.rank=1", ["config.best.attention.rank: unknown key"]),
        ("best.kind=full", ["config.best.kind: unknown key"]),
        ("width=abc", ["config.width: expected int, got 'abc'"]),
        ("width=1.5", ["config.width: expected int, got '1.5'"]),
        ("width=", ["config.width: expected int, got ''"]),
        ("lr=abc", ["config.lr: expected float, got 'abc'"]),
        ("lr=nan", ["config.lr: must be finite"]),
        ("on=maybe", ["config.on: expected true or false, got 'maybe'"]),
        ("pair=1,2,3", ["config.pair: expected 2 values, got 3"]),
        ("pair=1,x", ["config.pair[1]: expected int, got 'x'"]),
        ("width", ["config.width: expected --config.KEY=VALUE"]),
        ("best..note=1", ["expected --config.KEY=VALUE"]),
    ],
)
def test_overrides_that_are_refused(override, parts):
    fails(lambda: over(override), *parts)


def test_walk_names_every_record():
    names = [name for name, _ in sections.walk(over())]
    assert names == [
        "config",
        "config.blocks.a", "config.blocks.a.attention", "config.blocks.a.attention.rope",
        "config.blocks.b", "config.blocks.b.attention", "config.blocks.b.attention.rope",
        "config.best", "config.best.attention", "config.best.attention.rope",
    ]  # fmt: skip
