"""Rows drawn by domain: right shares, nothing lost, one order for any processes, exact resume."""

import collections
import json

import numpy as np
import pytest

from sparse_pretrain import data
from sparse_pretrain.data import draws, mixture, pipeline
from sparse_pretrain.data.pipeline import Share
from sparse_pretrain.games import mixtures
from tests.data.test_pipeline import same, stack, texts

EVEN = mixtures.FixedConfig()
HEDGE = mixtures.HedgeConfig(rate=0.5, lag=5)
NAMES = ("a", "b", "c")


@pytest.fixture
def corpus(make_corpus):
    """Three domains of 5, 7 and 12 documents."""
    kinds = [0] * 5 + [1] * 7 + [2] * 12
    order = np.random.default_rng(5).permutation(len(kinds))
    words, held = texts(len(kinds), 0), [(t, i % 3) for i, t in enumerate(texts(9, 1))]
    return make_corpus([(words[i] or "x", kinds[i]) for i in order], held, NAMES)


@pytest.fixture
def build(corpus, tmp_path):
    def make(game=EVEN, seed=0, share=None, of=None, **fields):
        fields = {"tokenizer": "bytes", "seq": 16, "batch": 6, "mixture": game} | fields
        made = pipeline.build(
            data.Config(**fields), of or corpus, tmp_path, seed=seed, share=share and Share(*share)
        )
        return mixture.Mixed(made)

    return make


def steps(iterator, count, first=1):
    """Batches as the loop asks for them, each step told one step late; (batches, what was said).

    A domain's loss is made of its number and the step's, so that weights move.
    """
    found, said = [], []
    for n in range(first, first + count):
        found.append(next(iterator))
        if n > first:
            said.append(tell(iterator, n - 1))
    said.append(tell(iterator, n))
    return found, said


def tell(iterator, n):
    return iterator.learn(np.array([3.0, 2.0, 2.0 + (-1) ** n]) * 32, np.full(3, 32.0))


@pytest.mark.parametrize("repeat", [False, True])
def test_a_mixture_of_one_domain_is_the_pipeline_without(make_corpus, tmp_path, repeat):
    one = make_corpus([(t, 0) for t in texts(23, 0)], domains=("a",))
    fields = {"tokenizer": "bytes", "seq": 16, "batch": 6, "repeat": repeat}
    plain = pipeline.build(data.Config(**fields), one, tmp_path, seed=3)
    mixed = mixture.Mixed(
        pipeline.build(data.Config(**fields, mixture=EVEN), one, tmp_path, seed=3)
    )
    assert (mixed.total_rows(), mixed.batches) == (plain.total_rows(), plain.batches)
    count = plain.batches or 60
    got, want = mixed.train(), plain.train()
    for _ in range(count):
        same(next(got), next(want))
    if not repeat:
        with pytest.raises(StopIteration):
            next(got)
    for a, b in zip(mixed.heldout(), plain.heldout(), strict=True):
        same(a, b)


@pytest.mark.parametrize("game", [EVEN, HEDGE])
def test_every_token_once(build, corpus, game):
    """A domain that has been read drops out; the end is that of all domains."""
    dataset = build(game)
    got, _ = steps(dataset.train(), dataset.batches)
    rows = stack(got)
    counted = rows.weights > 0
    assert counted.sum() == dataset.train_tokens
    for k in range(3):
        wanted = collections.Counter()
        documents = [d.text for d in corpus.train if d.domain == k]
        for text in documents:
            wanted.update(text.encode())
        wanted[256] = len(documents)
        assert collections.Counter(rows.targets[counted & (rows.domains == k)].tolist()) == wanted
    # no row is of two domains, and no document is in a row of another's
    for domains, segments in zip(rows.domains, rows.segments, strict=True):
        assert len(set(domains[segments > 0].tolist())) <= 1
    assert (rows.segments == 0).any(1).sum() <= 3 + 5  # each domain's end, the last batch's


def test_fixed_weights_are_the_shares_of_rows(build):
    wanted = {"a": 0.5, "b": 0.125, "c": 0.375}
    game = mixtures.FixedConfig(weights=",".join(f"{k}={v}" for k, v in wanted.items()))
    iterator = build(game, repeat=True, batch=50, seq=128).train()
    rows = np.concatenate([next(iterator).domains[:, 0] for _ in range(8)])
    for k, name in enumerate(NAMES):
        sigma = np.sqrt(wanted[name] * (1 - wanted[name]) / len(rows))
        assert abs((rows == k).mean() - wanted[name]) < 4 * sigma
    # the same draw by hand: of row n, by whole numbers
    units = np.cumsum([round(wanted[name] * 2**24) for name in NAMES])
    bits = [int(draws.draw(0, pipeline.DOMAINS, 0, n)) % int(units[-1]) for n in range(200)]
    assert rows[:200].tolist() == [int(np.searchsorted(units, b, side="right")) for b in bits]
    none = build(mixtures.FixedConfig(weights="a=0.5,c=0.5"), repeat=True, batch=50).train()
    assert set(np.unique(next(none).domains)) == {0, 2}


def test_a_decision_takes_effect_lag_steps_later(build):
    """The weights said to be in force are those of the game played by hand, `lag` steps before."""
    _, said = steps(build(HEDGE, repeat=True).train(), 20)
    state = mixtures.start(np.full(3, 1 / 3))
    decided = [state.weight] * HEDGE.lag
    for n in range(1, 21):
        told = np.array(list(said[n - 1]["mixture"].values()))
        np.testing.assert_allclose(told, decided[n - 1], atol=1e-7)
        losses = np.array([3.0, 2.0, 2.0 + (-1) ** n])
        assert list(said[n - 1]["domain_loss"].values()) == losses.tolist()
        state = mixtures.update(HEDGE, state, losses * 32, np.full(3, 32.0), told)
        decided.append(state.weight)
    assert said[-1]["mixture"]["a"] > 0.9


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_rows_do_not_depend_on_what_is_made_ahead(build, ahead):
    want, _ = steps(build(HEDGE, repeat=True).train(), 15)
    got, _ = steps(mixture.MixedIterator(build(HEDGE, repeat=True), ahead=ahead), 15)
    same(stack(got), stack(want))


@pytest.mark.parametrize(("game", "repeat"), [(EVEN, False), (HEDGE, False), (HEDGE, True)])
def test_resume_at_any_step(build, game, repeat):
    """Also with another number of batches made ahead; the cursor is JSON."""
    dataset = build(game, repeat=repeat)
    count = dataset.batches or 16
    iterator, states, want = dataset.train(), [], []
    for n in range(1, count + 1):
        states.append(json.loads(json.dumps(iterator.get_state())))
        want.append(next(iterator))
        tell(iterator, n)
    for done, state in list(enumerate(states))[::4]:
        again = mixture.MixedIterator(build(game, repeat=repeat), state, ahead=done % 4)
        assert again.get_state() == state
        got, _ = steps(again, min(6, count - done), first=done + 1)
        same(stack(got), stack(want[done : done + 6]))
    iterator.set_state(states[2])
    same(stack(steps(iterator, count - 2, first=3)[0]), stack(want[2:]))


def test_processes_together_read_what_one_reads(build):
    want, _ = steps(build(HEDGE).train(), 10)
    for count in (2, 3):
        parts = [steps(build(HEDGE, share=(i, count)).train(), 10)[0] for i in range(count)]
        for step in range(10):
            same(stack([part[step] for part in parts]), want[step])


def test_a_step_that_was_not_told_is_not_waited_for(build):
    iterator = build(HEDGE, repeat=True).train()
    for _ in range(HEDGE.lag - 2):
        next(iterator)
    with pytest.raises(AssertionError, match="step 6 is drawn, 0 are told"):
        next(iterator)


def test_errors(build, corpus, tmp_path, make_corpus):
    for fields, message in [
        ({"game": mixtures.FixedConfig(weights="a=0.5,d=0.5")},
         "data.mixture.weights: the text has no domain 'd'; known are a, b, c"),
        ({"game": HEDGE, "pack": "stream"}, "mixture.kind: 'hedge' needs pack documents, got"),
        ({"game": HEDGE, "source": "synthetic:copy"}, "mixture.kind: 'hedge' needs domains, 'sy"),
        ({"game": mixtures.HedgeConfig(lag=3)}, "mixture.lag: must be at least 4, since 2 batches"),
        ({"game": mixtures.FixedConfig(weights="b=1"), "of": make_corpus([("x", 0)])},
         "data.mixture.weights: no domain with a weight has training text"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as e:
            build(**fields)
        assert str(e.value).startswith(message)
        assert "\n" not in str(e.value)
    other, state = make_corpus([("abc", 0)], domains=("a",)), build().train().get_state()
    state["manifest_hash"], another = other.manifest["hash"], build(of=other)
    with pytest.raises(ValueError, match=r"data.domains: cursor has \['a', 'b', 'c'\], run has"):
        another.train(state)


def test_a_reference_is_a_finished_run_of_this_text(build, tmp_path):
    home = tmp_path / "reference"
    dataset = build(mixtures.DoremiConfig(reference=str(home)))

    def fails(message):
        with pytest.raises(ValueError, match=message) as e:
            dataset.train()
        assert "\n" not in str(e.value)

    fails("data.mixture.reference: .*reference' holds no finished run")
    home.mkdir()
    losses = {"a": 1.5, "b": 2.5, "c": 0.5}
    scored = {k: {"nats_per_token": v} for k, v in losses.items()}
    (home / "summary.json").write_text(json.dumps({"per_domain": scored}))
    kept = {k: dataset.manifest[k] for k in ("hash", "tokenizer_hash")}
    (home / "run.json").write_text(json.dumps({"manifest": kept | {"hash": "other"}}))
    fails("is of other text: its hash is other, here it is")
    (home / "run.json").write_text(json.dumps({"manifest": kept}))
    iterator = dataset.train()
    for _ in range(8):
        next(iterator)
        iterator.learn(np.array([1.0, 2.6, 0.5]), np.ones(3))
    assert iterator.mean_weights["b"] > iterator.mean_weights["a"]
    assert iterator.mean_weights["a"] == pytest.approx(iterator.mean_weights["c"])
    state = iterator.get_state()
    (home / "summary.json").write_text("{}")
    fails("holds no finished run")
    assert dataset.train(state).get_state() == state  # the cursor has its losses
    (home / "summary.json").write_text(json.dumps({"per_domain": {"a": scored["a"]}}))
    fails("has scored no text of domain 'b'")
