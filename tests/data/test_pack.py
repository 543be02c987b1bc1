"""Packing against a slow packer written with lists."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_pretrain.data import draws, store
from sparse_pretrain.data.corpus import Document
from sparse_pretrain.data.pack import Line
from sparse_pretrain.data.tokenize import Bytes, Chars
from sparse_pretrain.shapes import FIELDS, Batch

BYTES = Bytes()


def slow_pack(documents, eos, seq, *, segments=True, score_eos=True):
    """Rows as lists of slots (token, target, segment, position, weight, bytes, domain).

    `documents` holds (ids, widths, domain); without an eos the text simply goes on.
    """
    slots, line = [], []
    for number, (ids, widths, domain) in enumerate(documents):
        if eos is None:
            line += [
                (token, width, number, domain) for token, width in zip(ids, widths, strict=True)
            ]
        else:
            weights = [1.0] * len(ids) + [1.0 if score_eos else 0.0]
            for slot in zip([eos, *ids], [*ids, eos], weights, [*widths, 0], strict=True):
                token, target, weight, width = slot
                slots.append([token, target, number, None, weight, width, domain])
    for (token, _, number, domain), (target, width, _, _) in itertools.pairwise(line):
        slots.append([token, target, number, None, 1.0, width, domain])
    rows = []
    while slots:
        row, slots = slots[:seq], slots[seq:]
        seen, done = [], []
        for token, target, number, _, weight, width, domain in row:
            if number not in seen:
                seen.append(number)
            segment = seen.index(number) + 1 if segments else 1
            position = sum(1 for d in done if d[2] == segment)
            done.append([token, target, segment, position, weight, width, domain])
        rows.append(done + [[0] * 7] * (seq - len(done)))
    return rows


def memory_store(texts, tokenizer, tmp_path, name):
    documents = [Document(text, i % 3, str(i)) for i, text in enumerate(texts)]
    return store.open_store(documents, name, tokenizer, tmp_path)


def spans_of(texts, tokenizer):
    spans = [(*tokenizer.spans(t), i % 3) for i, t in enumerate(texts)]
    return [(ids.tolist(), widths.tolist(), domain) for ids, widths, domain in spans]


def assert_rows(batch: Batch, rows):
    for number, field in enumerate(FIELDS):
        got = getattr(batch, field)
        assert got.dtype == (np.float32 if field == "weights" else np.int32), field
        np.testing.assert_array_equal(got, [[slot[number] for slot in row] for row in rows], field)


texts_strategy = st.lists(st.text("abé🙂\n", max_size=23), min_size=1, max_size=12)


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@settings(max_examples=60, deadline=None)
@given(texts=texts_strategy, seq=st.integers(2, 17), seed=st.integers(0, 9))
def test_rows_equal_the_slow_packer(tmp_path_factory, segments, eos, texts, seq, seed):
    tokenizer = BYTES if eos else Chars("abé🙂\n", eos=False)
    made = memory_store(texts, tokenizer, tmp_path_factory.mktemp("store"), "x")
    spans = [s for s in spans_of(texts, tokenizer) if s[0]]
    order = draws.permutation(len(spans), seed) if eos else np.arange(len(spans))
    score = bool(seed % 2)
    line = Line(made, seq, order=order, segments=segments, score_eos=score)
    rows = slow_pack(
        [spans[i] for i in order], tokenizer.eos, seq, segments=segments, score_eos=score
    )
    assert line.rows == len(rows)
    if rows:
        assert_rows(line.batch(np.arange(len(rows))), rows)
        some = np.array([len(rows) - 1, 0, len(rows), -1, 0])
        blank = [[0] * 7] * seq
        assert_rows(line.batch(some), [rows[-1], rows[0], blank, blank, rows[0]])


def test_by_hand():
    made = store.from_text("abc", BYTES)
    batch = Line(made, 3).batch(np.arange(2))
    assert batch.tokens.tolist() == [[256, 97, 98], [99, 0, 0]]
    assert batch.targets.tolist() == [[97, 98, 99], [256, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.bytes.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_crops_start_anywhere(tmp_path):
    made = memory_store(["hello", "world"], Chars("helo wrd", eos=False), tmp_path, "x")
    line = Line(made, 4, segments=False)
    batch = line.crops(np.array([0, 3, 5]))
    text = "helloworld"
    letters = "".join(sorted(set("helo wrd")))
    got = ["".join(letters[i] for i in row) for row in batch.tokens]
    assert got == [text[0:4], text[3:7], text[5:9]]
    got = ["".join(letters[i] for i in row) for row in batch.targets]
    assert got == [text[1:5], text[4:8], text[6:10]]
    assert (batch.positions == np.arange(4)).all()
    assert (batch.segments == 1).all()


def test_store_is_made_once_whole_and_again_for_another_tokenizer(tmp_path):
    class Counting(list):
        reads = 0

        def __iter__(self):
            Counting.reads += 1
            return super().__iter__()

    documents = Counting([Document("abc", 0, ""), Document("", 1, ""), Document("dé", 2, "")])
    made = store.open_store(documents, "n", BYTES, tmp_path)
    assert made.tokens.tolist() == [256, 97, 98, 99, 256, 100, 0xC3, 0xA9, 256]
    assert made.widths.tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert made.starts.tolist() == [0, 4, 8]
    assert made.domains.tolist() == [0, 2]
    again = store.open_store(documents, "n", BYTES, tmp_path)
    np.testing.assert_array_equal(made.tokens, again.tokens)
    assert Counting.reads == 1
    store.open_store(documents, "n", Chars("abcdé", eos=True), tmp_path)
    assert Counting.reads == 2
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_store_that_fails_half_way_leaves_nothing(tmp_path):
    def documents():
        yield Document("abc", 0, "")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.open_store(documents(), "n", BYTES, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_store_in_chunks_equals_the_store_in_one(tmp_path, monkeypatch):
    documents = [Document("word " * i, i % 2, "") for i in range(20)]
    whole = store.open_store(documents, "whole", BYTES, tmp_path)
    monkeypatch.setattr(store, "CHUNK_BYTES", 50)
    parts = store.open_store(documents, "parts", BYTES, tmp_path)
    for a, b in zip(whole[:4], parts[:4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_draws():
    # Oracle: SplitMix64 of one word in Python integers.
    def splitmix(x):
        mask = (1 << 64) - 1
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for n in (0, 1, 2**40):
        assert int(draws.draw(n)) == splitmix((n + golden) % 2**64)
    for size in (1, 2, 7, 1000):
        assert sorted(draws.permutation(size, 3, 4)) == list(range(size))
        assert sorted(draws.shuffled(np.arange(size), size, 3, 4)) == list(range(size))
    # grain's order must not change between its versions, or old cursors would read other rows.
    golden = [1, 9, 2, 4, 11, 3, 0, 8, 7, 6, 5, 10]
    assert draws.shuffled(np.arange(12), 12, 0).tolist() == golden
    assert draws.permutation(100, 1).tolist() != draws.permutation(100, 2).tolist()
    table = draws.below(6, 5, np.arange(1000)[:, None], np.arange(60))
    assert table.shape == (1000, 60)
    counts = np.bincount(table.ravel(), minlength=6)
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(60_000 / 6 * 5 / 6)
    assert len(np.unique(draws.draw(5, np.arange(1000)[:, None], np.arange(60)))) == 60_000
