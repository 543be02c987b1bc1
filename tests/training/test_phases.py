"""Phases: what a step trains follows from its number; what a phase leaves alone stays."""

import contextlib
import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import attention, checkpoint, config, nn, optim, shapes
from sparse_pretrain.attention import full
from sparse_pretrain.data import pack, store
from sparse_pretrain.model import block, ffn, layers, lm
from sparse_pretrain.training import course, loop, recovery, run, state, step, trained
from tests.model.conftest import EXPERTS, packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(full.Config):
    KIND: ClassVar[str] = "toy"

    learn: bool = True


class Indexer(nn.Module):
    def __init__(self, width, keys):
        self.norm = layers.RMSNorm(width, keys)
        self.w = nn.param(keys, (width, 3), ("D", "J"), std=0.3)


class Toy(full.Full):
    """Full attention with a part that learns to say 1, and reads nothing into the output."""

    Config = ToyConfig
    own: ClassVar[tuple[str, ...]] = ("indexer",)

    def __init__(self, config, width, keys, *, out_gain=1.0):
        super().__init__(config, width, keys, out_gain=out_gain)
        self.indexer = Indexer(width, keys)

    @staticmethod
    def trains_own(config):
        return config.learn

    def attend(self, x, context):
        if not self.config.learn:
            return self(x, context), None
        seen = self.indexer.norm(jax.lax.stop_gradient(x)).astype(jnp.float32)
        guess = seen @ nn.read(self.indexer.w)
        return self(x, context), jnp.mean((guess - 1.0) ** 2, axis=-1)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(attention.TABLE, "toy", Toy)


def _setup(model, kind):
    """(definition, a state without compiling an initialisation, what makes a step function)."""
    definition, rng = lm.define(model), np.random.default_rng(1)
    table = optim.TABLE[kind]

    def schedule(n):
        return jnp.asarray(1e-2, jnp.float32)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    tx = table.build(table.Config(lr=1e-2), definition.dims, schedule)
    params = jax.tree.map(draw, definition.shapes)
    average = jax.tree.map(lambda p: 0.5 * p, params)
    prices = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), definition.price_shapes)
    zero, key = jnp.zeros((), jnp.int32), jax.random.key(0)
    fresh = state.TrainState(zero, params, tx.init(params), prices, {}, average, key)

    def make(**changes):
        return step.make_train_step(
            definition, model, tx, schedule=schedule, ema=0.9, **changes
        )

    return definition, fresh, make


def _model(section=None, feed=EXPERTS):
    toy = block.Config(attention=section or ToyConfig(heads=2), ffn=feed)
    sizes = {"width": 32, "vocab": 61, "dtype": "float32", "repeats": 1}
    return lm.Config(**sizes, blocks={"toy": toy}, pattern=("toy",))


def _named(tree):
    """Name -> array of every leaf; a key's bits."""

    def plain(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): plain(x) for path, x in leaves}


def test_an_indexer_phase_moves_the_indexer_alone(toy, rng):
    """Parameters, moments, averages and prices of all others stay to the bit, decay included.

    Muon holds both its own momentum and Adam's moments.
    """
    _, now, make = _setup(_model(), "muon")
    now, _ = make()(now, packed(rng, rows=8))  # so that moments and prices are not zero
    alone = make(train="indexer", accumulate=2)
    before = _named(now)
    for _ in range(2):
        now, out = alone(now, packed(rng, rows=8))
    assert float(out["indexer_loss"]) > 0
    after = _named(now)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    counts = {name for name in before if before[name].dtype == np.int32 and before[name].ndim == 0}
    own = {name for name in before if "['indexer']" in name}
    assert own <= moved <= own | counts
    assert len(own) == 3 + 4  # w: itself, average, momentum; the norm's scale: two moments
    assert any("router" in name and np.abs(before[name]).max() > 0 for name in before)
    assert any("opt" in name and name not in own | counts for name in before)


def test_a_prices_phase_moves_the_prices_alone_and_ever_less(toy, rng):
    """By the sign rule as numpy does it on the loads that the step tells, times 16 / (16 + n)."""
    _, now, make = _setup(_model(), "muon")
    settle, first = make(train="prices", accumulate=2, first=5), 5
    now = now._replace(step=jnp.int32(first))
    before = _named(now)
    bias = np.asarray(now.router["stack_0"]["ffn"]["router"]["bias"], np.float64)
    for n in range(3):
        now, out = settle(now, packed(rng, rows=8))
        load = np.asarray(out["load"]["stack_0"], np.float64)
        sign = np.sign(load.mean(-1, keepdims=True) - load)
        bias = bias + 16 / (16 + n) * EXPERTS.router.rate * (sign - sign.mean(-1, keepdims=True))
        np.testing.assert_allclose(
            now.router["stack_0"]["ffn"]["router"]["bias"], bias, atol=1e-7
        )
    after = _named(now)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    counts = {name for name in before if before[name].dtype == np.int32 and before[name].ndim == 0}
    assert moved - counts == {n for n in before if n.endswith("['bias']")}
    assert int(now.step) == first + 3


def test_an_indexer_phase_is_an_optimizer_of_the_indexer_alone(toy, rng):
    """Against the update of a tree that holds nothing else, by gradients of that loss alone."""
    model = _model()
    definition, fresh, make = _setup(model, "adamw")
    batch = packed(rng, rows=8)
    params, prices = jax.tree.map(jnp.array, (fresh.params, fresh.router))

    def own_loss(indexer):
        group = params["stack_0"]
        attention_part = group["attention"] | {"indexer": indexer}
        whole = params | {"stack_0": group | {"attention": attention_part}}
        return definition.merge(whole, prices)(batch, train=True)[1].own

    indexer = params["stack_0"]["attention"]["indexer"]
    grads = jax.jit(jax.grad(own_loss))(indexer)
    dims = definition.dims["stack_0"]["attention"]["indexer"]
    table = optim.TABLE["adamw"]
    tx = table.build(table.Config(lr=1e-2), dims, lambda n: jnp.asarray(1e-2, jnp.float32))
    updates, _ = tx.update(grads, tx.init(indexer), indexer)
    after, out = make(train="indexer")(fresh, batch)
    for ours, was, moved in zip(
        *map(jax.tree.leaves, (after.params["stack_0"]["attention"]["indexer"], indexer, updates)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, was + np.asarray(moved), atol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(out["grad_norm"], norm, rtol=1e-5)


def _cut(batch, length):
    """The same by a loop over tokens."""
    rows = []
    for r in range(batch.tokens.shape[0]):
        for start in range(0, batch.tokens.shape[1], length):
            piece = shapes.Batch(*(np.array(f[r, start : start + length]) for f in batch.fields))
            document, place, last = 0, 0, None
            for i, old in enumerate(batch.segments[r, start : start + length]):
                if i and old == last:
                    place += 1
                else:
                    place, document = 0, document + (old != 0)
                piece.segments[i] = document if old else 0
                piece.positions[i], last = place, old
            rows.append(piece)
    fields = zip(*(row.fields for row in rows), strict=True)
    return shapes.Batch(*map(np.stack, fields))


@pytest.mark.parametrize("length", [8, 12, 24])
def test_rows_are_cut_as_by_a_loop(length, rng):
    batch = packed(rng, rows=5)
    for name, ours, theirs in zip(
        shapes.Batch._fields, step.cut(batch, length), _cut(batch, length), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("segments", [True, False])
def test_cut_rows_are_the_rows_that_shorter_packing_makes(segments, rng):
    lengths = rng.integers(1, 40, 30)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)])
    tokens = rng.integers(1, 50, starts[-1] + 1).astype(np.int32)
    tokens[starts] = 0
    widths = np.where(tokens, 1 + tokens % 3, 0).astype(np.int32)
    text = store.Store(tokens, widths, starts, np.arange(30, dtype=np.int32) % 3, 0)
    long, short = (pack.Line(text, seq, segments=segments) for seq in (24, 8))
    whole = np.arange(long.rows - 1)  # the last one ends in padding, which has no document
    pieces = np.arange(3 * len(whole))
    for name, ours, theirs in zip(
        shapes.Batch._fields, step.cut(long.batch(whole), 8), short.batch(pieces), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_a_step_on_shorter_rows_taken_in_parts_equals_one_on_rows_cut_before(rng):
    batch = packed(rng, rows=8)
    results = []
    model = _model(full.Config(heads=2), ffn.DenseConfig(hidden=16))
    ways = ({}, _cut(batch, 8)), ({"seq": 8, "accumulate": 4}, batch), ({}, batch)
    for changes, rows in ways:
        _, fresh, make = _setup(model, "adamw")
        results.append(make(**changes)(fresh, rows)[1])
    cut, parts, uncut = results
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(parts[name], cut[name], rtol=1e-5, err_msg=name)
    assert abs(float(uncut["loss"]) - float(cut["loss"])) > 1e-4


# --- whole runs ---


def experiment(section, phases, **changes):
    """Nine steps of a small model on made-up text."""
    values = {
        "name": "tiny",
        "steps": 9,
        "data": {"source": "synthetic:copy:length=8", "seq": 32, "batch": 4},
        "model": {
            "width": 32,
            "blocks": {"b": {"attention": section, "ffn": {"kind": "dense", "hidden": 16}}},
            "pattern": ["b"],
            "repeats": 1,
        },
        "optim": {"kind": "adamw", "lr": 0.01},
        "ema": 0.9,
        "eval": {"tokens": 128},
        "sample": {"tokens": 0},
        "phases": phases,
    }
    return config.from_config_dict(values | changes)


def _rows(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return rows


NEAR = {"kind": "sliding", "window": 3, "sinks": False}


@pytest.mark.slow  # a run of two phases; by default one is stopped inside a phase and resumed
def test_a_switch_of_attention_equals_training_by_hand(tmp_path):
    """Full, sliding, full: the steps of two configurations on one state, to the bit."""
    section = {"kind": "full", "heads": 2}
    phases = {"near": {"start": 4 * 128, "attention": {"b": NEAR}}, "far": {"start": 0.75}}
    wanted = experiment(section, phases, eval={"every": 5}, checkpoint={"every": 5})
    summary = loop.train(wanted, tmp_path, ["test"], quiet=True)
    rows = _rows(tmp_path)
    assert [r["phase"] for r in rows] == ["base"] * 4 + ["near"] * 3 + ["far"] * 2

    far = run.prepare(experiment(section, {}))
    near = run.prepare(experiment(section | NEAR, {}))
    steps = [
        step.make_train_step(
            p.definition, p.experiment.model, far.tx, schedule=far.schedule, ema=0.9
        )
        for p in (far, near)
    ]
    now, batches = state.create(far.definition, far.tx, 0, ema=True), far.dataset.train()
    for row in rows:
        now, out = steps[4 < row["step"] <= 7](now, next(batches))
        assert row["loss"] == float(out["loss"]), row["step"]
        assert row["grad_norm"] == float(out["grad_norm"]), row["step"]
    saved, _ = checkpoint.Checkpointer(tmp_path).restore(now)
    ours, theirs = _named(saved), _named(now)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    def kind(opened):
        return opened.definition.merge(opened.params, opened.prices).config.layer_list[0].attention

    evals = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [(r["step"], r["phase"]) for r in evals] == [(5, "near"), (9, "far")]
    last, middle = trained.open_run(tmp_path), trained.open_run(tmp_path, "5")
    assert (kind(last).KIND, kind(middle).KIND) == ("full", "sliding")
    for opened, row in ((last, summary), (middle, evals[0])):
        assert trained.scores(opened)["bits_per_byte"] == row["bits_per_byte"]

    derived = json.loads((tmp_path / "run.json").read_text())["derived"]
    flops = 6 * far.derived["train_flops_per_token"] + 3 * near.derived["train_flops_per_token"]
    assert far.derived["train_flops_per_token"] > near.derived["train_flops_per_token"]
    assert summary["flops"] == derived["flops"] == pytest.approx(128 * flops, rel=1e-12)
    first = [(r["name"], r["first_step"], r["start_tokens"]) for r in derived["phases"]]
    assert first == [("base", 1, 0), ("near", 5, 512), ("far", 8, 896)]


def test_a_run_stopped_inside_a_phase_resumes_to_the_bit(toy, tmp_path, monkeypatch):
    """Dense, then the indexer alone, then everything on shorter rows at half the rate."""
    stop = 5
    learn = {"attention": {"b": {"learn": True}}}
    phases = {
        "warm": {"start": 1 / 3, "train": "indexer"} | learn,
        "sparse": {"start": 2 / 3, "seq": 8, "lr": 0.5} | learn,
    }
    wanted = experiment({"kind": "toy", "heads": 2, "learn": False}, phases, accumulate=2)
    whole = loop.train(wanted, tmp_path / "whole", ["test"], quiet=True)
    with monkeypatch.context() as patch:
        asked: list[int] = []
        original = course.Course.step

        def counted(self, n, *args):
            if n == stop:
                asked.append(2)
            return original(self, n, *args)

        patch.setattr(course.Course, "step", counted)
        patch.setattr(recovery, "stop_requests", lambda: contextlib.nullcontext(asked))
        with pytest.raises(recovery.Interrupted, match=f"step {stop} of 9"):
            loop.train(wanted, tmp_path / "parts", ["test"], quiet=True)
    half = checkpoint.Checkpointer(tmp_path / "parts").latest()
    assert half == stop
    longer = dataclasses.replace(wanted, steps=12)
    with pytest.raises(ValueError, match=r"config.phases.warm.start: is after step 3 .* in tokens"):
        loop.train(longer, tmp_path / "parts", ["test"], quiet=True)
    resumed = loop.train(wanted, tmp_path / "parts", ["test"], quiet=True)
    assert resumed["bits_per_byte"] == whole["bits_per_byte"]
    told = [
        [(r["phase"], r["loss"], r["grad_norm"], r["lr"], r.get("indexer_loss")) for r in rows]
        for rows in (_rows(tmp_path / "whole"), _rows(tmp_path / "parts"))
    ]
    assert told[0] == told[1]
    assert [r[4] is not None for r in told[0]] == [False] * 3 + [True] * 6
    prepared = run.prepare(wanted)
    template = state.create(prepared.definition, prepared.tx, 0, ema=True)
    ours, theirs = (
        _named(checkpoint.Checkpointer(tmp_path / w).restore(template)[0])
        for w in ("parts", "whole")
    )
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    plain = run.prepare(dataclasses.replace(wanted, phases={}))
    rates = [float(plain.schedule(n)) * (0.5 if n >= 6 else 1.0) for n in range(9)]
    np.testing.assert_allclose([r[3] for r in told[0]], rates, rtol=1e-6)
    changed = dataclasses.replace(
        wanted,
        phases=wanted.phases | {"sparse": dataclasses.replace(wanted.phases["sparse"], lr=1.0)},
    )
    with pytest.raises(ValueError, match=r"phases.sparse.lr: 0.5 there, 1.0 here"):
        loop.train(changed, tmp_path / "parts", ["test"], quiet=True)
