"""Held-out loads of experts, and text that a run has not read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import data
from sparse_pretrain.shapes import Batch
from sparse_pretrain.training import evaluate, loop, loss, trained
from tests.training.test_loop import experiment


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A run of six steps over a corpus of some fifty rows' worth of batches."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    (root / "text").mkdir()
    for i in range(12):
        words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(200)]
        (root / "text" / f"{i}.txt").write_text(" ".join(words))
    loop.train(experiment(root / "text", steps=6), root / "run", [], quiet=True)
    return trained.open_run(root / "run")


def test_balance_is_the_busiest_expert_above_the_mean():
    load = np.array([[4.0, 4.0, 4.0, 4.0], [10.0, 6.0, 0.0, 0.0]])
    found = evaluate.balance(load)
    assert found["max_vio_global"] == pytest.approx((0 + 1.5) / 2)
    assert found["dead_experts"] == 2


def test_every_scored_position_fills_its_seats(opened):
    found = trained.scores(opened)
    positions = sum(int((b.segments > 0).sum()) for b in trained.dataset(opened).heldout())
    load = np.array(found["load"])
    assert load.shape == (2, 4)  # layers, experts
    np.testing.assert_array_equal(load.sum(1), 2 * positions)  # top 2, padding not counted
    assert found["max_vio_global"] >= 0


def test_unread_text_is_what_training_would_read_next(opened):
    section = opened.experiment.data
    _, batches = trained.unread(opened, 3 * section.batch * section.seq)
    whole = data.load(section, seed=opened.experiment.seed).train()
    for _ in range(opened.step):
        next(whole)
    got = list(batches)
    assert len(got) == 3
    for batch in got:
        np.testing.assert_array_equal(batch.tokens, next(whole).tokens)
    assert trained.scores(opened, unread_tokens=256)["tokens"] > 0


def test_more_unread_text_than_there_is_says_how_much_is_left(opened):
    with pytest.raises(ValueError, match=r"--unread: 1000000000 tokens asked for, \d+ are left"):
        trained.unread(opened, 10**9)


def test_accuracy_is_the_share_of_likeliest_targets_of_tasks_only(opened, rng):
    assert "accuracy" not in trained.scores(opened)
    source = "synthetic:recall:pairs=2,vocab=20,heldout=6"
    found = data.load(dataclasses.replace(opened.experiment.data, source=source), seed=0)
    vocab = opened.experiment.model.vocab
    head = rng.normal(size=opened.params["head"].shape).astype(np.float32)
    params = {**opened.params, "head": head}
    score = evaluate.Evaluator(opened.definition, found.domains, accuracy=True)
    got = score(params, opened.prices, found.heldout())
    model, right, count = opened.definition.merge(params, opened.prices), 0, 0
    for batch in found.heldout():
        hidden = np.asarray(jax.jit(lambda b: model(b)[0])(batch), np.float64)
        logits = hidden @ np.asarray(jnp.asarray(head, jnp.bfloat16), np.float64)
        assert logits.shape[-1] == vocab
        right += ((logits.argmax(-1) == batch.targets) * batch.weights).sum()
        count += batch.weights.sum()
    assert got["accuracy"] == got["per_domain"]["recall"]["accuracy"] == right / count


@pytest.mark.parametrize(
    ("length", "want"),
    [(2, (0, 2)), (64, (0, 64)), (65, (0, 64, 65)), (256, (0, 64, 128, 256)),
     (300, (0, 64, 128, 256, 300))],
)  # fmt: skip
def test_buckets_double_up_to_the_row(length, want):
    assert evaluate.edges(length) == want


def test_loss_by_position_is_a_loop_over_targets(opened):
    rng = np.random.default_rng(1)
    batches = []
    for ends in ((150,), (70, 150)):  # one document, then two and padding; odd targets uncounted
        ints = rng.integers(0, 100, (4, 2, 160)).astype(np.int32)
        segments, positions = np.zeros((2, 2, 160), np.int32)
        for i, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            segments[:, start:end] = i + 1
            positions[:, start:end] = np.arange(end - start)
        weights = ((segments > 0) & (rng.random((2, 160)) < 0.8)).astype(np.float32)
        tokens, targets, size, domains = ints
        batches.append(
            Batch(tokens, targets, segments, positions, weights, size % 4, domains % 2)
        )
    score = evaluate.Evaluator(opened.definition, ("a", "b"))
    found = score(opened.params, opened.prices, batches)

    model = opened.definition.merge(opened.params, opened.prices)
    by_token = jax.jit(lambda batch: loss.token_losses(model, model(batch)[0], batch)[1])
    want = {}
    for batch in batches:
        nats = np.asarray(by_token(batch), np.float64)
        for at in np.argwhere(batch.weights > 0):
            position = batch.positions[tuple(at)]
            low = 0 if position < 64 else 2 ** int(np.log2(position))
            want.setdefault(low, []).append(nats[tuple(at)])
    assert [(r["from"], r["to"]) for r in found["by_position"]] == [(0, 64), (64, 128), (128, 160)]
    for row in found["by_position"]:
        assert row["tokens"] == len(want[row["from"]])
        assert row["nats_per_token"] == pytest.approx(np.mean(want[row["from"]]), rel=1e-4)
    total = sum(r["nats_per_token"] * r["tokens"] for r in found["by_position"])
    assert total / found["tokens"] == pytest.approx(found["nats_per_token"], rel=1e-6)
    assert sum(d["tokens"] for d in found["per_domain"].values()) == found["tokens"]
