"""Held-out loads of experts, and text that a run has not read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import data
from sparse_pretrain.training import evaluate, loop, trained
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
