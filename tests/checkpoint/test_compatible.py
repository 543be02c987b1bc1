"""Which changes of a config a resumed run accepts."""

import copy

import pytest

from sparse_pretrain import checkpoint

CONFIG = {
    "name": "a",
    "seed": 1,
    "steps": 100,
    "model": {"width": 8, "blocks": {"first": {"ffn": {"kind": "moe", "experts": 16}}}},
    "data": {"source": "python_stdlib", "seq": 256},
    "optim": {"kind": "muon", "lr": 0.01, "ns_coefficients": (3.4, -4.7, 2.0)},
    "checkpoint": {"every": 10},
    "eval": {"tokens": None},
    "log": {"sinks": []},
}


def changed(key, value):
    config = copy.deepcopy(CONFIG)
    *path, last = key.split(".")
    section = config
    for name in path:
        section = section[name]
    section[last] = value
    return config


def test_same():
    assert checkpoint.check_compatible(CONFIG, copy.deepcopy(CONFIG)) == []
    assert checkpoint.differing(CONFIG, CONFIG) == {}


def test_a_list_from_json_is_a_tuple():
    saved = changed("optim.ns_coefficients", [3.4, -4.7, 2.0])
    assert checkpoint.check_compatible(saved, CONFIG) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2),
        ("model.width", 16),
        ("model.blocks.first.ffn.experts", 8),
        ("model.blocks.first.ffn.kind", "dense"),
        ("data.seq", 512),
        ("optim.kind", "adamw"),
        ("optim.lr", 0.02),
        ("optim.ns_coefficients", (3.4, -4.7, 2.1)),
        ("model.new", 3),
    ],
)
def test_refused_with_key_and_both_values(key, value):
    new = changed(key, value)
    with pytest.raises(ValueError) as e:
        checkpoint.check_compatible(CONFIG, new, "runs/a")
    old = checkpoint.differing(CONFIG, new)[key][0]
    assert str(e.value).startswith("runs/a holds a run of another config: ")
    assert f"{key}: {old!r} there, " in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="another config"):
        checkpoint.check_compatible(new, CONFIG)


def test_every_differing_key_is_named():
    new = changed("seed", 2) | {"data": {"source": "x", "seq": 256}}
    with pytest.raises(ValueError, match=r"data\.source: .*; seed: 1 there, 2 here"):
        checkpoint.check_compatible(CONFIG, new)


def test_another_experiment_is_refused_with_what_one_can_read():
    new = CONFIG | {f"key{i}": i for i in range(40)}
    with pytest.raises(ValueError, match=r"key13: .*; and 34 keys more; use a new workdir$"):
        checkpoint.check_compatible(CONFIG, new)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "b"),
        ("checkpoint.every", 5),
        ("eval.tokens", 1000),
        ("log.sinks", ["tensorboard"]),
    ],
)
def test_free(key, value):
    assert checkpoint.check_compatible(CONFIG, changed(key, value)) == []


def test_length_may_change_with_a_note():
    notes = checkpoint.check_compatible(CONFIG, changed("steps", 200))
    assert notes == ["steps: 100 before, 200 from here on"]
