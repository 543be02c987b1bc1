"""Rolling hashes, MinHash, clusters and overlap against sets of strings, which need no wit."""

import random

import numpy as np
import pytest

from sparse_pretrain.data import dedup, spool

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho".split()


def prose(seed, words=600):
    r = random.Random(seed)
    return " ".join(f"{r.choice(WORDS)}{r.randrange(100)}" for _ in range(words))


def edited(text, seed, share):
    """`text` with about `share` of its words replaced."""
    r = random.Random(seed)
    return " ".join(f"x{r.random()}" if r.random() < share else w for w in text.split(" "))


def shingle_set(text):
    text = "".join(c for c in text if ord(c) > 32)
    width = max(1, min(dedup.SHINGLE, len(text)))
    return {text[i : i + width] for i in range(len(text) - width + 1)}


def jaccard(a, b):
    a, b = shingle_set(a), shingle_set(b)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("width", [1, 3, 50])
def test_rolling_hash_is_equal_exactly_where_strings_are(width):
    text = "".join(random.Random(0).choices("abé漢😀\n", k=4000)) + "ab" * 60 + "\0\0" * 40
    hashes = dedup.rolling(dedup.codes(text), width)
    strings = [text[i : i + width] for i in range(len(text) - width + 1)]
    assert len(hashes) == len(strings)
    assert len(set(zip(hashes.tolist(), strings, strict=True))) == len(set(strings))
    assert len(set(hashes.tolist())) == len(set(strings))


def test_rolling_hash_does_not_see_its_chunks(monkeypatch):
    text = prose(0, 2000)
    whole = dedup.rolling(dedup.codes(text), 50)
    monkeypatch.setattr(dedup, "_CHUNK", 777)
    np.testing.assert_array_equal(dedup.rolling(dedup.codes(text), 50), whole)


def test_rolling_hash_of_too_little_text_is_empty():
    assert len(dedup.rolling(dedup.codes("abc"), 4)) == 0
    assert len(dedup.rolling(dedup.codes(""), 1)) == 0


@pytest.mark.parametrize("words", [12, 600])  # with and without empty bins
def test_minhash_estimates_the_exact_jaccard_similarity(words):
    errors = []
    for seed in range(120):
        a = prose(seed, words)
        b = edited(a, seed + 1, random.Random(seed).random() * 0.15)
        exact = jaccard(a, b)
        estimate = dedup.similarity(dedup.signature(a), dedup.signature(b))
        errors.append((estimate - exact, max(exact * (1 - exact), 1e-9)))
    # Independent bins have variance J (1 - J) / BINS; filled-in ones add to it.
    factor = 4.0 if words < 100 else 1.3
    ratio = np.mean([e**2 for e, _ in errors]) / np.mean([v / dedup.BINS for _, v in errors])
    assert ratio < factor
    assert abs(np.mean([e for e, _ in errors])) < 0.02


def test_clusters_join_near_duplicates_and_nothing_else():
    texts, expected = [], []
    for group in range(60):
        base = prose(group)
        for copy in range(1 + group % 4):
            texts.append(edited(base, 1000 + group * 10 + copy, 0.004) if copy else base)
            expected.append(group)
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    found = dedup.clusters(np.stack([dedup.signature(texts[i]) for i in order]))
    names = {}
    for i, cluster in zip(order, found.tolist(), strict=True):
        assert names.setdefault(expected[i], cluster) == cluster
    assert len(set(names.values())) == 60
    for position, cluster in enumerate(found.tolist()):  # named by the first member
        assert cluster <= position
        assert found[cluster] == cluster


def test_clusters_of_nothing_and_of_one():
    assert dedup.clusters(np.zeros((0, dedup.BINS), np.uint64)).tolist() == []
    assert dedup.clusters(dedup.signature("a b c")[None]).tolist() == [0]


def brute_covered(text, train):
    shared = {t[i : i + 50] for t in train for i in range(len(t) - 49)}
    mask = np.zeros(len(text), bool)
    for i in range(len(text) - 49):
        if text[i : i + 50] in shared:
            mask[i : i + 50] = True
    return mask


def test_overlap_equals_a_set_of_strings():
    a, b, c = prose(1), prose(2), prose(3)
    heldout = [a[:700] + b[100:180] + a[900:], c[:49], "", c[:50] + "é", prose(4)]
    train = [b, c, "short", ""]
    overlap = dedup.Overlap(heldout)
    overlap.scan(train)
    masks = list(overlap.covered())
    for text, mask in zip(heldout, masks, strict=True):
        np.testing.assert_array_equal(mask, brute_covered(text, train))
    assert masks[0].sum() >= 80
    assert masks[3].sum() == 50
    assert overlap.share() == sum(m.sum() for m in masks) / sum(map(len, heldout))


def test_overlap_without_windows_is_zero():
    overlap = dedup.Overlap(["too short"])
    overlap.scan(["too short"])
    assert overlap.share() == 0.0


@pytest.mark.parametrize("lines", [True, False])
def test_parts_join_to_the_text_and_have_bounded_sizes(lines):
    text = prose(0, 60_000)
    text = text.replace(" alpha", "\nalpha") if lines else text
    cut = list(spool.parts(text))
    assert "".join(cut) == text
    assert len(cut) > 5
    assert all(spool.PART // 2 <= len(p) <= 4 * spool.PART for p in cut[:-1])
    if lines:
        assert spool.PART / 2 < np.mean([len(p) for p in cut]) < 2 * spool.PART


def test_parts_of_a_repeated_passage_are_equal_again():
    passage = prose(0, 60_000).replace(" alpha", "\nalpha") + "\n"
    cut = list(spool.parts(prose(1, 777) + "\n" + passage + prose(2, 333) + "\n" + passage))
    shared = sum(len(p) for p in set(cut) if cut.count(p) == 2)
    assert shared > 0.8 * len(passage)


def test_spool_returns_what_it_was_given(tmp_path):
    store = spool.Spool(tmp_path)
    texts = ["", "a", "é漢😀\n", prose(0)]
    assert [store.add(t) for t in texts] == [0, 1, 2, 3]
    assert [store[i] for i in (3, 0, 2, 1)] == [texts[i] for i in (3, 0, 2, 1)]
    assert store.add("later") == 4
    assert store[4] == "later"
    assert store.size(2) == len(texts[2].encode())
    store.close()
    assert not list(tmp_path.iterdir())
