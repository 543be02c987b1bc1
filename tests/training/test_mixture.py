"""A run whose rows are drawn by a game: sums by domain, exact resume, what it leaves."""

import json
import shutil

import jax
import numpy as np
import pytest

from sparse_pretrain import checkpoint, config
from sparse_pretrain.report import write_report
from sparse_pretrain.training import loop, loss, run, trained
from tests.model.conftest import packed, small
from tests.training import processes as runs
from tests.training.test_step import _setup

STEPS = 10
HEDGE = {"kind": "hedge", "rate": 2.0, "lag": 5}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two domains, of which one is easy."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for domain, letters in (("easy", "ab"), ("hard", "abcdefghijklmnopqrstuvwxyz")):
        (folder / domain).mkdir()
        for i in range(8):
            (folder / domain / f"{i}.txt").write_text("".join(rng.choice(list(letters), 3000)))
    return folder


def experiment(folder, mixture=None, **changes):
    """A dense model of a few thousand parameters."""
    dense = {"attention": {"kind": "full", "heads": 2}, "ffn": {"kind": "dense", "hidden": 16}}
    section = {"source": f"text_folder:{folder}", "tokenizer": "bytes", "seq": 32, "batch": 8}
    values = {
        "name": "mixed", "steps": STEPS, "accumulate": 2,
        "data": section | {"mixture": mixture or HEDGE},
        "model": {"width": 16, "blocks": {"dense": dense}, "pattern": ["dense"], "repeats": 1},
        "optim": {"kind": "adamw", "lr": 0.01}, "checkpoint": {"every": 5, "keep": 9},
        "eval": {"tokens": 256}, "sample": {"tokens": 0},
    }  # fmt: skip
    return config.from_config_dict(values | changes)


def train(wanted, workdir):
    return loop.train(wanted, workdir, [], quiet=True)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_steps_sums_are_those_of_a_loop_over_targets(rng):
    batch = packed(rng, rows=4)
    batch = batch._replace(domains=rng.integers(0, 3, batch.domains.shape).astype(np.int32))
    settings = small(prefix=(), pattern=("dense",), repeats=1)
    definition, fresh, step = _setup(settings, accumulate=2, domains=3)
    params, prices = jax.tree.map(np.asarray, (fresh.params, fresh.router))

    @jax.jit
    def each(params, prices, batch):
        model = definition.merge(params, prices)
        return loss.token_losses(model, model(batch, train=True)[0], batch)[1]

    wanted = np.zeros((2, 3))
    for half in (slice(0, 2), slice(2, 4)):
        part = type(batch)(*(field[half] for field in batch.fields))
        nats = np.asarray(each(params, prices, part), np.float64)
        for n, weight, k in zip(nats.flat, part.weights.flat, part.domains.flat, strict=True):
            wanted[:, k] += (n * weight, weight)
    _, out = step(fresh, batch)
    np.testing.assert_allclose(out["domains"], wanted, rtol=1e-5)
    np.testing.assert_allclose(out["loss"] * wanted[1].sum(), wanted[0].sum(), rtol=1e-5)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(experiment(text), workdir)


def test_a_resumed_run_equals_one_that_was_not(text, whole, tmp_path):
    """From the checkpoint in the middle: losses, weights, cursor and game, to the bit."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(checkpoint.folder(tmp_path) / f"{STEPS:08d}")
    (tmp_path / "summary.json").unlink()
    summary = train(experiment(text), tmp_path)
    keys = ("loss", "grad_norm", "mixture", "domain_loss")
    ours, theirs = ([[row[k] for k in keys] for row in rows(w)] for w in (tmp_path, whole[0]))
    assert ours == theirs
    assert summary["mixture"] == whole[1]["mixture"]
    cursors = [checkpoint.Checkpointer(w).meta()["cursor"] for w in (tmp_path, whole[0])]
    assert cursors[0] == cursors[1]
    assert cursors[0]["mixture"]["told"] == cursors[0]["mixture"]["step"] == STEPS


def test_what_a_run_leaves(text, whole):
    workdir, summary = whole
    told = rows(workdir)
    assert told[0]["mixture"] == {"easy": 0.5, "hard": 0.5}
    assert told[4]["mixture"] == told[0]["mixture"]  # nothing is decided in the first `lag` steps
    assert told[-1]["mixture"]["hard"] > 0.51
    for row in told:
        assert sum(row["mixture"].values()) == pytest.approx(1)
        assert set(row["domain_loss"]) == {"easy", "hard"}
    assert sum(summary["mixture"].values()) == pytest.approx(1)
    page = write_report(workdir).read_text()
    assert 'id="mixture"' in page
    assert "Mixture of domains" in page
    # a run of it is scored like any other, on its own text; what it reads next hangs on its game
    assert trained.scores(trained.open_run(workdir))["per_domain"].keys() == {"easy", "hard"}
    with pytest.raises(ValueError, match="--unread: the mixture 'hedge' goes by the losses"):
        trained.scores(trained.open_run(workdir), unread_tokens=256)


def test_a_step_without_a_mixture_has_no_sums(rng):
    _, fresh, step = _setup(small(prefix=(), pattern=("dense",), repeats=1))
    assert "domains" not in jax.eval_shape(step, fresh, packed(rng, rows=4))[1]


@pytest.mark.slow
def test_doremi_from_a_reference_run_and_fixed_weights_from_its_mean(text, tmp_path):
    even = experiment(text, {"kind": "fixed"})
    train(even, tmp_path / "reference")
    game = {"kind": "doremi", "reference": str(tmp_path / "reference"), "rate": 0.1}
    mean = train(experiment(text, game), tmp_path / "proxy")["mixture"]
    named = ",".join(f"{k}={v:.4f}" for k, v in mean.items())
    train(experiment(text, {"kind": "fixed", "weights": named}), tmp_path / "main")
    told = rows(tmp_path / "main")[-1]["mixture"]
    assert told == pytest.approx(mean, abs=1e-3)
    unread = trained.scores(trained.open_run(tmp_path / "main"), unread_tokens=256)
    assert unread["tokens"] > 0


@pytest.mark.slow
def test_processes_decide_the_same_weights(text, tmp_path):
    """The losses and weights of two processes of two devices are those of one of four."""
    more = (
        f"--config.data.source=text_folder:{text}", "--config.data.tokenizer=bytes",
        "--config.data.mixture.kind=hedge", "--config.data.mixture.rate=5",
    )  # fmt: skip
    for name, processes in (("one", 1), ("two", 2)):
        running = runs.start(
            tmp_path, name, processes=processes, devices=4 // processes, mesh="expert=2", more=more
        )
        runs.finish(tmp_path, name, running)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["mixture"] == pytest.approx(a["mixture"], abs=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert one[-1]["mixture"]["hard"] > 0.51


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "mesh"), [("fsdp_tp", "fsdp=4,tensor=2"), ("ddp_pp", "data=4,pipe=2")]
)
def test_plans_and_pipelines_draw_the_same_rows(plan, mesh, text, tmp_path):
    """Sums by domain are those of all devices, rows and stages: losses and weights are one's."""
    model = {
        "width": 16, "dtype": "float32", "pattern": ["dense"], "repeats": 2,
        "blocks": {"dense": {"attention": {"kind": "full", "heads": 2},
                             "ffn": {"kind": "dense", "hidden": 16}}},
    }  # fmt: skip
    train(experiment(text, model=model), tmp_path / "one")
    train(experiment(text, model=model, plan=plan, mesh=mesh), tmp_path / "many")
    one, many = rows(tmp_path / "one"), rows(tmp_path / "many")
    for a, b in zip(one, many, strict=True):
        assert b["mixture"] == pytest.approx(a["mixture"], abs=1e-6)
        assert b["domain_loss"] == pytest.approx(a["domain_loss"], abs=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert many[-1]["mixture"]["hard"] > 0.51


def test_a_run_from_before_there_were_mixtures_goes_on(text, tmp_path):
    """Its record has no such key, which is as none."""
    plain = experiment(text, {"kind": "none"})
    kept = plain.to_dict()
    del kept["data"]["mixture"]
    (tmp_path / "run.json").write_text(json.dumps({"config": kept, "manifest": {}, "derived": {}}))
    assert run.same_run(plain, tmp_path) == []
    with pytest.raises(ValueError, match=r"data.mixture.kind: 'none' there, 'hedge' here"):
        run.same_run(experiment(text), tmp_path)
