"""500 random edits of configurations (250 by default): each builds, or is refused in one line.

An edit picks any leaf of the tree, its kinds and block names included, and any value, plausible or
hostile. The oracle knows nothing of the checks: a configuration is good when the loss and the
optimizer can be built from it without arrays, and a refusal is good when it is a ValueError of one
line that names a key that was edited.
"""

import copy
import dataclasses
import functools
import json
import math
import random
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from sparse_pretrain import config, optim, sections, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.optim import schedules
from sparse_pretrain.training import loop, loss, metrics, recovery

HOSTILE = (
    *(0, -1, 1, 2, 3, 5, 7, 10**6, 2**31, 10**12, 2**53, 10**30),
    *(0.0, 0.5, 1.5, -0.5, 1e-30, 1e30, float("nan"), float("inf")),
    *("", "bogus", "two\nlines", None, True, False, [], [1, "a"], ["moe"], {}, {"kind": "x"}),
)
BASES = {
    "moe": {
        "name": "fuzz",
        "steps": 4,
        "data": {"source": "synthetic:copy", "seq": 64, "batch": 4},
        "model": {
            "width": 32,
            "vocab": 32,
            "blocks": {
                "moe": {
                    "attention": {"kind": "mla", "heads": 2},
                    "ffn": {"kind": "moe", "experts": 4, "hidden": 16},
                }
            },
            "pattern": ["moe"],
            "repeats": 2,
        },
        "optim": {"kind": "muon"},
        "sample": {"tokens": 0},
    },
    "dense": {
        "name": "fuzz",
        "steps": 4,
        "accumulate": 2,
        "data": {"source": "synthetic:copy", "seq": 64, "batch": 4},
        "model": {
            "width": 32,
            "vocab": 32,
            "blocks": {
                "dense": {
                    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
                    "ffn": {"kind": "dense", "hidden": 32},
                }
            },
            "pattern": ["dense"],
            "repeats": 1,
            "tied": True,
            "remat": "full",
            "dtype": "float32",
        },
        "optim": {"kind": "adamw"},
        "schedule": {"kind": "cosine"},
        "sample": {"tokens": 0},
        "phases": {"near": {"start": 0.5, "seq": 32, "attention": {"dense": {"kind": "moba"}}}},
    },
}


def leaves(tree, prefix=()):
    """The key path and value of everything in a tree that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def plausible(rng, value):
    """Something near a value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, 2 * value, value // 2, 3 * value, rng.randint(1, 99)]
        )
    if isinstance(value, float):
        return rng.choice([value * 2, value / 3, 1 - value, -value, value + 1, rng.random()])
    if isinstance(value, str):
        known = [
            "mla",
            "full",
            "dense",
            "moe",
            "muon",
            "adamw",
            "wsd",
            "cosine",
            "constant",
            "none",
        ]
        known += ["dots", "full", "float32", "bfloat16", "float64", "bytes", "bpe:300", "stream"]
        return rng.choice([*known, value.upper(), value + "x", value[:-1]])
    if isinstance(value, (list, tuple)):
        return rng.choice([list(value) * 2, list(value)[:-1], [*value, "other"], value])
    return rng.choice([1, 0.5, "x"])


def edits(seed):
    """(the edited tree, the dotted keys edited), the same for the same seed."""
    rng = random.Random(seed)
    tree = config.defaults(rng.choice([*BASES.values()]))
    keys = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(leaves(tree))
        if rng.random() < 0.4:  # most checks are about the model
            found = [leaf for leaf in found if leaf[0][0] in ("model", "data")] or found
        path, value = rng.choice(found)
        where = tree
        for key in path[:-1]:
            where = where[key]
        new = plausible(rng, value) if rng.random() < 0.6 else copy.deepcopy(rng.choice(HOSTILE))
        last = path[-1]
        if rng.random() < 0.05:
            last = last + rng.choice(["s", "_x"])  # a key that does not exist
        where[last] = new
        if last == "kind" and isinstance(new, str):  # what belonged to the old kind goes with it
            for key in [k for k in where if k != "kind"]:
                if rng.random() < 0.9:
                    del where[key]
                else:  # or may be what the new kind does not know
                    keys.append(".".join((*path[:-1], key)))
        keys.append(".".join((*path[:-1], last)))
    return tree, keys


def abstract(experiment):
    """Builds loss and optimizer state of a configuration without any array."""
    model = experiment.model
    for stage in experiment.stages(max(experiment.steps_of(0), 4)):
        size = (experiment.data.batch // experiment.accumulate, stage.seq)
        key = repr((stage.model, size, experiment.accumulate))
        _loss(key, _Held((stage.model, size, experiment.accumulate)))
    key = repr((model, experiment.optim, experiment.schedule, experiment.data, experiment.steps))
    _optimizer(key, _Held(experiment))


class _Held:
    """Takes a value past a cache that looks at the key only."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Held)

    def __hash__(self):
        return 0


@functools.cache
def _define(key, held):
    del key
    return lm.define(held.value)


@functools.cache
def _loss(key, held):
    del key
    model, size, accumulate = held.value
    definition = _define(repr(model), _Held(model))
    kinds = {"weights": jnp.float32}
    batch = shapes.Batch(
        *(jax.ShapeDtypeStruct(size, kinds.get(f, jnp.int32)) for f in shapes.FIELDS)
    )

    def scalar(params, prices, batch):
        weight = jnp.maximum(jnp.sum(batch.weights), 1.0)
        return loss.loss_sums(definition, params, prices, batch, weight, accumulate)

    total, _ = jax.eval_shape(scalar, definition.shapes, definition.price_shapes, batch)
    assert total.shape == ()


@functools.cache
def _optimizer(key, held):
    del key
    e = held.value
    definition = _define(repr(e.model), _Held(e.model))
    per_step = e.tokens_per_step
    schedule = schedules.make(
        e.schedule,
        peak=e.optim.lr,
        total_tokens=max(e.steps_of(0), 1) * per_step,
        tokens_per_step=per_step,
    )
    tx = optim.TABLE[e.optim.KIND].build(e.optim, definition.dims, schedule)
    jax.eval_shape(tx.init, definition.shapes)


def refusal(error, keys):
    """What is wrong with a refusal; '' when it is a good one."""
    text = str(error)
    if not isinstance(error, ValueError):
        return f"{type(error).__name__}: {text[:300]}"
    if "\n" in text or not text or len(text) > 600:
        return f"not one line: {text[:300]!r}"
    names = {part for key in keys for part in key.split(".")[-1:]}
    if not any(name in text for name in names):
        return f"names none of {sorted(names)}: {text}"
    return ""


def check(seed, build=abstract):
    """'' when the edits of `seed` work or are refused well; else what is wrong."""
    tree, keys = edits(seed)
    shown = {k: v for k, v in sections.flat(tree).items() if k in keys}
    try:
        experiment = config.from_config_dict(tree)
        if not experiment.model.vocab:
            experiment, _ = config.complete(experiment, vocab=32, train_tokens=10**9)
        build(experiment)
    except Exception as e:
        wrong = refusal(e, keys)
        return f"seed {seed}: {shown}: {wrong}" if wrong else ""
    return ""


@pytest.mark.parametrize(
    "part", [*range(5), *(pytest.param(part, marks=pytest.mark.slow) for part in range(5, 10))]
)
def test_every_edit_builds_or_is_refused_in_one_line(part):
    wrong = [w for w in map(check, range(50 * part, 50 * (part + 1))) if w]
    assert not wrong, "\n".join(wrong)


def test_the_edits_reach_everything_and_come_out_both_ways():
    reached, outcomes = set(), {True: 0, False: 0}
    for seed in range(500):
        tree, keys = edits(seed)
        reached |= set(keys)
        try:
            config.from_config_dict(tree)
            outcomes[True] += 1
        except ValueError:
            outcomes[False] += 1
    known = {k for base in BASES.values() for k in sections.flat(config.defaults(base))}
    assert len(known & reached) > 0.9 * len(known), known - reached
    assert min(outcomes.values()) > 100, outcomes


def _small(experiment):
    """Whether a configuration trains in seconds."""
    model, rows = experiment.model, experiment.tokens_per_step
    steps = experiment.steps_of(0)
    if not (rows <= 1024 and 0 < steps <= 8 and model.layers <= 4 and model.width <= 128):
        return False
    shapes_of = lm.define(dataclasses.replace(model, vocab=model.vocab or 4096)).shapes
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of)) <= 1 << 24  # a gigabyte at most


def outcome(tree, keys, folder):
    """(what came of training a tree, what is wrong with that or '').

    The first is trained, stopped (by a loss that is not finite), refused (before the first step) or
    large (and so not tried).
    """
    try:
        experiment = config.from_config_dict(tree)
    except ValueError as e:
        return "refused", refusal(e, keys)
    if not _small(experiment):
        return "large", ""
    try:
        summary = loop.train(experiment, folder, ["test"], quiet=True)
    except recovery.RunFailed as e:
        return "stopped", _unclear(str(e), folder)
    except Exception as e:
        began = metrics.read_rows(folder / "metrics.jsonl")
        late = f"after {len(began)} steps: {type(e).__name__}: {e}" if began else ""
        return "refused", late or refusal(e, keys)
    losses = [r["loss"] for r in metrics.read_rows(folder / "metrics.jsonl")]
    numbers = [*losses, summary["bits_per_byte"]]
    if None in numbers or not all(map(math.isfinite, numbers)):
        return "trained", f"not all finite: {numbers}"
    if not summary["steps"] == len(losses) == experiment.steps_of(0):
        return "trained", f"{len(losses)} of {experiment.steps_of(0)} steps"
    return "trained", ""


def _unclear(text, folder):
    """What a stop for a loss that is not finite lacks: the reason, the batch, the status."""
    step = re.fullmatch(r"step (\d+): loss .* are not both finite; the batch is saved as .*", text)
    if step is None:
        return f"says {text!r}"
    if not (folder / f"nonfinite_step_{step[1]}.npz").exists():
        return f"the batch of step {step[1]} is not there"
    rows = metrics.read_rows(folder / "metrics.jsonl")
    if len(rows) != int(step[1]) - 1:
        return f"{len(rows)} rows before step {step[1]}"
    status = json.loads((folder / "run.json").read_text())["status"]
    return "" if status == "failed" else f"the status is {status}"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder to train in, the working directory too: an edited path must not land in ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_twenty_edits_train(elsewhere):
    """Twenty that are accepted, however many are refused or lose their loss on the way there."""
    seen, wrong = Counter(), []
    for seed in range(1001, 2000):
        tree, keys = edits(seed)
        came, bad = outcome(tree, keys, elsewhere / str(seed))
        seen[came] += 1
        wrong += [f"seed {seed}: {keys}: {came}: {bad}"] if bad else []
        if seen["trained"] == 20:
            break
    assert not wrong, "\n".join(wrong)
    assert seen["trained"] == 20, seen
    assert seen["refused"] > 10, seen


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_a_clear_stop(elsewhere):
    tree = config.defaults(BASES["dense"])
    tree["optim"] |= {"lr": 1e30, "clip": 0.0}
    assert outcome(tree, ["optim.lr"], elsewhere / "run") == ("stopped", "")


def test_what_came_of_an_edit_is_told_apart(elsewhere, monkeypatch):
    """With a loop that does as told: rows written, then an error or a summary."""

    def told(rows, end):
        folder = elsewhere / str(len(list(elsewhere.iterdir())))

        def train(experiment, workdir, argv, quiet):
            workdir.mkdir()
            (workdir / "run.json").write_text('{"status": "failed"}')
            lines = [json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(rows, 1)]
            (workdir / "metrics.jsonl").write_text("".join(lines))
            (workdir / "nonfinite_step_3.npz").touch()
            if isinstance(end, Exception):
                raise end
            return end

        monkeypatch.setattr(loop, "train", train)
        came, wrong = outcome(config.defaults(BASES["moe"]), ["data.seq"], folder)
        return came, bool(wrong)

    stop = "step {}: loss nan and gradient norm 1.0 are not both finite; the batch is saved as x"
    done, four = {"steps": 4, "bits_per_byte": 1.0}, [2.0] * 4
    assert told(four, done) == ("trained", False)
    assert told([2.0, None, 2.0, 2.0], done) == ("trained", True)
    assert told(four, done | {"bits_per_byte": math.nan}) == ("trained", True)
    assert told([2.0] * 3, done) == ("trained", True)
    assert told([], ValueError("data.seq: too short")) == ("refused", False)
    assert told([], ValueError("something")) == ("refused", True)
    assert told([2.0], ValueError("data.seq: too short")) == ("refused", True)
    assert told([2.0] * 2, recovery.RunFailed(stop.format(3))) == ("stopped", False)
    assert told([2.0] * 2, recovery.RunFailed(stop.format(2))) == ("stopped", True)
    assert told([2.0] * 2, recovery.RunFailed("gave up")) == ("stopped", True)
