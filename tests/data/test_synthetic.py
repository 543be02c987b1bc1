"""Synthetic tasks: answers from solvers that see only the inputs."""

import itertools
import json

import numpy as np
import pytest

from sparse_pretrain import data
from sparse_pretrain.data import synthetic
from sparse_pretrain.data.pipeline import Share
from sparse_pretrain.shapes import Batch


def load(source, seed=0, seq=64, batch=8, **share):
    return data.load(data.Config(source=source, seq=seq, batch=batch), seed=seed, **share)


def solve_copy(context):
    """The symbol as far after the mark as it was after the start."""
    mark = context.index(1)
    return context[1 + (len(context) - 1 - mark)]


def solve_induction(context):
    """What followed the last symbol where it occurred before."""
    earlier = [i for i, t in enumerate(context[:-1]) if t == context[-1]]
    assert len(earlier) == 1
    return context[earlier[0] + 1]


def solve_gap(context):
    """The value that followed the last key the only time it was there before the mark."""
    shown = context[: context.index(1)]
    assert shown.count(context[-1]) == 1
    return shown[shown.index(context[-1]) + 1]


def solve_recall(context):
    """The value shown beside the last key."""
    shown = context[1 : context.index(1)]
    table = dict(zip(shown[::2], shown[1::2], strict=True))
    assert len(table) == len(shown) // 2
    return table[context[-1]]


def solve_needle(context):
    """The value in the only needle with the key that was asked for, which no question was of."""
    needles = [context[i + 1 : i + 3] for i, t in enumerate(context[:-2]) if t == 1]
    (value,) = [v for k, v in needles if k == context[-1]]
    assert context[-2] == 1
    return value


SOURCES = {
    "synthetic:copy": (solve_copy, 16),
    "synthetic:copy:length=5,vocab=3": (solve_copy, 5),
    "synthetic:induction": (solve_induction, 1),
    "synthetic:induction:length=2,vocab=4": (solve_induction, 1),
    "synthetic:recall": (solve_recall, 8),
    "synthetic:recall:pairs=3,vocab=8": (solve_recall, 3),
    "synthetic:recall:pairs=3,length=20,gap=8,vocab=16": (solve_gap, 3),
    "synthetic:recall:pairs=2,length=30,gap=6,short=6,ramp=3,vocab=16": (solve_gap, 2),
    "synthetic:needle": (solve_needle, 1),
    "synthetic:needle:length=20,needles=5,asked=3,vocab=32": (solve_needle, 3),
    "synthetic:needle:length=20,needles=2,short=7,ramp=5,vocab=16": (solve_needle, 1),
    "synthetic:needle:length=12,needles=4,vocab=16": (solve_needle, 1),
}


def examples(batch: Batch):
    """(inputs, [(slot, target)], targets) of every example."""
    for row in zip(*batch.fields, strict=True):
        tokens, targets, segments, positions, weights, sizes, _ = row
        np.testing.assert_array_equal(sizes, weights)
        assert (weights[segments == 0] == 0).all()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            assert tokens[here][0] == 0
            assert (tokens[here][1:] > 0).all()
            assert tokens[here][1:].tolist() == targets[here][:-1].tolist()
            scored = np.flatnonzero(weights[here])
            yield tokens[here].tolist(), [(s, int(targets[here][s])) for s in scored]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_follow_from_the_context(source, split):
    solve, answers = SOURCES[source]
    dataset = load(source)
    batches = dataset.heldout(2000) if split == "heldout" else dataset.train()
    count = 0
    for batch in itertools.islice(batches, 4):
        assert max(batch.tokens.max(), batch.targets.max()) < dataset.vocab
        for tokens, scored in examples(batch):
            assert len(scored) == answers
            for slot, target in scored:
                assert solve(tokens[: slot + 1]) == target
            count += 1
    assert count >= 32


@pytest.mark.parametrize("source", ["synthetic:induction", "synthetic:needle:length=12,vocab=17"])
def test_places_and_answers_are_uniform(source):
    dataset = load(source, seq=64, batch=64)
    iterator = dataset.train()
    places, answers = [], []
    for _ in range(20):
        for tokens, ((_, target),) in examples(next(iterator)):
            key = tokens[-1]
            places.append(tokens.index(1) if "needle" in source else tokens.index(key))
            answers.append(target)
    for drawn in (places, answers):
        _, counts = np.unique(drawn, return_counts=True)
        wanted = len(drawn) / len(counts)
        assert np.abs(counts - wanted).max() < 5 * np.sqrt(wanted)
    assert len(set(places)) == (10 if "needle" in source else 31)
    assert len(set(answers)) == (5 if "needle" in source else 30)


def test_nothing_shown_lies_in_the_gap_and_pairs_lie_anywhere_before():
    dataset = load("synthetic:recall:pairs=2,length=12,gap=5,vocab=32", seq=64, batch=64)
    iterator, places = dataset.train(), []
    for _ in range(20):
        for tokens, _ in examples(next(iterator)):
            at = [i for i, t in enumerate(tokens[1:13]) if 2 <= t < 12]  # keys are the first third
            places.append(tuple(at))
            assert all(22 <= t for i, t in enumerate(tokens[1:13]) if {i, i - 1}.isdisjoint(at))
    # two runs of 2 in 7 places: 10 arrangements
    drawn, counts = np.unique(places, axis=0, return_counts=True)
    assert len(drawn) == 10
    assert drawn.max() == 5
    assert np.abs(counts - len(places) / 10).max() < 5 * np.sqrt(len(places) / 10)


@pytest.mark.parametrize("task", ["recall:pairs=2,length=40", "needle:needles=2,asked=2,length=40"])
def test_noise_is_of_as_many_symbols_as_asked(task):
    for noise, want in ((3, {22, 23, 24}), (0, set(range(22, 34)))):
        dataset = load(f"synthetic:{task},vocab=34,noise={noise}", batch=32)
        batches = itertools.islice(dataset.train(), 4)
        assert {t for b in batches for t in b.tokens[b.tokens >= 22].tolist()} == want


def test_training_begins_with_short_examples_that_parts_of_a_row_do_not_cut():
    source = "synthetic:recall:pairs=2,length=40,gap=20,short=8,ramp=20,vocab=32"
    dataset = load(source, seq=60, batch=8)
    iterator = dataset.train()
    batches = [next(iterator) for _ in range(4)]
    rows = [np.concatenate(f) for f in zip(*(b.fields for b in batches), strict=True)]
    tokens, segments, weights = rows[0], rows[2], rows[4]
    for n in range(32):
        starts = [i for i in range(60) if segments[n, i] and (i == 0 or tokens[n, i] == 0)]
        assert starts == ([0, 15, 30, 45] if n < 20 else [0])  # 13 tokens each; 45 tokens
        assert weights[n].sum() == (8 if n < 20 else 2)
    first = {tuple(tokens[n, i : i + 13]) for n in range(20) for i in (0, 15, 30, 45)}
    assert len(first) == 80
    (held, *_) = dataset.heldout()
    assert (held.segments.max(1) == 1).all()
    assert (held.weights.sum(1) == 2).all()
    without = load(source.replace("ramp=20", "ramp=0"), seq=60, batch=8).train()
    later = [next(without) for _ in range(4)][3]
    np.testing.assert_array_equal(later.tokens, batches[3].tokens)


@pytest.mark.parametrize("source", list(SOURCES)[::2])
def test_same_interface_resume_shares_and_seeds(source):
    iterator, states, expected = load(source).train(), [], []
    for _ in range(5):
        states.append(json.loads(json.dumps(iterator.get_state())))
        expected.append(next(iterator))
    for step, state in enumerate(states):
        halves = [load(source, process_index=i, process_count=2).train() for i in range(2)]
        for half in halves:
            half.set_state(state)
        for want in expected[step:]:
            fields = zip(*(next(half).fields for half in halves), strict=True)
            got = Batch(*map(np.concatenate, fields))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
    other = next(load(source, seed=1).train())
    assert not np.array_equal(other.tokens, expected[0].tokens)
    assert not np.array_equal(expected[1].tokens, expected[0].tokens)


def test_heldout_is_finite_the_same_for_all_seeds_and_not_in_train():
    a, b = (list(load("synthetic:recall:heldout=20", seed=s).heldout()) for s in (0, 1))
    assert len(a) == 3
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
    assert (a[2].segments[4:] == 0).all()
    assert (a[2].segments[:4] > 0).any(1).all()
    held = {tuple(t) for batch in a for t, _ in examples(batch)}
    iterator = load("synthetic:recall", seed=0).train()
    seen = {tuple(t) for _ in range(50) for t, _ in examples(next(iterator))}
    assert len(seen) == 50 * 8
    assert not held & seen
    assert len(list(load("synthetic:recall").heldout(65))) == 1


def test_vocabulary_manifest_and_text():
    dataset = load("synthetic:recall:pairs=8,vocab=256")
    assert dataset.vocab == dataset.manifest["vocab"] == 256
    assert dataset.domains == ("recall",)
    assert dataset.manifest["hash"] == load("synthetic:recall:vocab=256").manifest["hash"]
    assert dataset.manifest["hash"] != load("synthetic:recall:vocab=128").manifest["hash"]
    assert dataset.batches is None
    (batch,) = dataset.text("3 5\n255")
    assert batch.tokens[0, :4].tolist() == [0, 3, 5, 255]
    assert batch.targets[0, :4].tolist() == [3, 5, 255, 0]
    assert batch.weights.sum() == 3
    assert batch.bytes.sum() == 7
    assert dataset.tokenizer.decode([0, 3, 255]) == "3 255"
    for word in ("0", "256", "x"):
        with pytest.raises(ValueError, match=f"text: '{word}' is not a symbol from 1 to 255"):
            dataset.text(f"3 {word}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("synthetic:sort", "synthetic tasks are copy, induction, recall, needle"),
        ("synthetic:copy:size=3", "'size=3' in .* is not KEY=NUMBER with a key of length, vocab"),
        ("synthetic:copy:length=x", "'length=x' in"),
        ("synthetic:copy:length=0", "has length=0; it takes at least 1"),
        ("synthetic:copy:vocab=2", "has vocab=2; it takes at least 3"),
        ("synthetic:copy:length=32", "data.seq: 64 tokens do not hold an example of copy, .* 65"),
        ("synthetic:recall:pairs=8,vocab=17", "has vocab=17; it takes at least 18"),
        ("synthetic:recall:length=20,gap=5", "has length=20; it takes at least 21"),
        ("synthetic:recall:gap=5", "has length=0; it takes at least 21"),
        ("synthetic:recall:length=40,vocab=25", "has vocab=25; it takes at least 26"),
        ("synthetic:recall:length=40,gap=8,ramp=2", "has short=0; it takes at least 16"),
        ("synthetic:recall:length=20,short=30,ramp=2", "has length=20; it takes at least 30"),
        ("synthetic:recall:length=40,vocab=32,noise=11", "has vocab=32; it takes at least 35"),
        ("synthetic:needle:ramp=2", "has short=0; it takes at least 3"),
        ("synthetic:needle:asked=2", "has needles=1; it takes at least 2"),
        ("synthetic:needle:needles=30", "has length=61; it takes at least 90"),
        ("synthetic:needle:needles=2,vocab=7", "has vocab=7; it takes at least 8"),
        ("synthetic:copy:heldout=0", "has heldout=0; it takes at least 1"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(ValueError, match=message) as e:
        load(source)
    assert str(e.value).startswith("data.")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"data\.batch: 8 rows do not divide over 3 processes"):
        synthetic.build(data.Config(source="synthetic:copy", batch=8), seed=0, share=Share(0, 3))
