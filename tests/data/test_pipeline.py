"""Datasets: nothing lost or seen twice, one order for any number of processes, exact resume."""

import collections
import dataclasses
import json
import multiprocessing
import time

import numpy as np
import pytest

from sparse_pretrain import data
from sparse_pretrain.data import pipeline
from sparse_pretrain.data.pipeline import Share
from sparse_pretrain.shapes import Batch

WORDS = "the cat sat on a mat – naïve 日本 🙂 x = 1\n".split(" ")


def texts(count, seed, longest=90):
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS, rng.integers(0 if i else 1, longest // 4))) for i in range(count)
    ]


@pytest.fixture
def corpus(make_corpus):
    return make_corpus(
        [(t, i % 2) for i, t in enumerate(texts(23, 0))],
        [(t, i % 2) for i, t in enumerate(texts(9, 1))],
    )


@pytest.fixture
def build(corpus, tmp_path):
    def make(seed=0, share=None, of=None, **fields):
        fields = {"tokenizer": "bytes", "seq": 16, "batch": 6} | fields
        return pipeline.build(
            data.Config(**fields), of or corpus, tmp_path, seed=seed, share=share and Share(*share)
        )

    return make


def stack(batches):
    fields = zip(*(b.fields for b in batches), strict=True)
    return Batch(*map(np.concatenate, fields))


def same(a: Batch, b: Batch):
    for field, x, y in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, field)


def batches(dataset, steps):
    iterator = dataset.train()
    return [next(iterator) for _ in range(steps)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "char"])
@pytest.mark.parametrize("pack", ["documents", "stream"])
def test_an_epoch_has_every_token_once(build, corpus, tokenizer, pack):
    dataset = build(tokenizer=tokenizer, pack=pack)
    every = list(dataset.train())
    assert len(every) == dataset.batches
    rows = stack(every)
    counted = rows.weights > 0
    assert counted.sum() == dataset.train_tokens
    wanted = collections.Counter()
    domain_bytes = collections.Counter()
    for document in corpus.train:
        wanted.update(dataset.tokenizer.encode(document.text).tolist())
        domain_bytes[document.domain] += len(document.text.encode())
    got = collections.Counter(rows.targets[counted].tolist())
    eos = dataset.tokenizer.eos
    if eos is None:  # the very first token of all has nothing before it
        wanted[dataset.tokenizer.encode(corpus.train[0].text).tolist()[0]] -= 1
    else:
        wanted[eos] = sum(1 for d in corpus.train if d.text)
        for domain, size in domain_bytes.items():
            assert rows.bytes[rows.domains == domain].sum() == size
    assert got == +wanted
    # Padding is the end of one row and whole rows of the last batch, nothing else.
    short = ((rows.segments > 0).sum(1) % dataset.config.seq) > 0
    assert short.sum() <= 1
    assert (rows.segments > 0).sum(1).min() == 0 or rows.segments.shape[0] % 6 == 0
    padding = rows.segments == 0
    for field in rows.fields:
        assert (field[padding] == 0).all()


def test_documents_can_be_read_back_from_their_pieces(build, corpus):
    dataset = build(seed=3)
    # Chain the pieces of an epoch: where a row goes on from another, its first input is that
    # row's last target and the text continues.
    whole = {d.text.encode() for d in corpus.train if d.text}
    found = set()
    rest = []
    for batch in dataset.train():
        for tokens, targets, segments, positions in zip(*batch[:4], strict=True):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                assert (np.diff(np.flatnonzero(here)) == 1).all()
                assert positions[here].tolist() == list(range(here.sum()))
                assert tokens[here][1:].tolist() == targets[here][:-1].tolist()
                piece = (tokens[here].tolist(), targets[here].tolist())
                if piece[0][0] == 256 and piece[1][-1] == 256:
                    found.add(bytes(piece[1][:-1]))
                else:
                    rest.append(piece)
    heads = [p for p in rest if p[0][0] == 256]
    tails = [p for p in rest if p[0][0] != 256]
    assert found <= whole
    missing = whole - found
    assert len(heads) == len(missing)
    starts = [bytes(t for t in targets if t != 256) for _, targets in heads]
    for start in starts:
        assert any(text.startswith(start) for text in missing)
    assert sum(len(t) for _, t in rest) == sum(len(m) + 1 for m in missing)
    assert {i[0] for i, _ in tails} <= {t[-1] for _, t in rest}


@pytest.mark.parametrize("pack", data.PACKS)
@pytest.mark.parametrize("repeat", [False, True])
def test_processes_together_read_what_one_reads(build, pack, repeat):
    alone = build(pack=pack, repeat=repeat)
    steps = alone.batches or 40
    expected = batches(alone, steps)
    for count in (2, 3, 6):
        shares = [build(pack=pack, repeat=repeat, share=(i, count)) for i in range(count)]
        parts = [batches(s, steps) for s in shares]
        for step in range(steps):
            same(stack([p[step] for p in parts]), expected[step])
        for mine, all_ in ((list(s.heldout()), list(alone.heldout())) for s in shares[:1]):
            assert len(mine) == len(all_)
            same(mine[-1], Batch(*(f[: 6 // count] for f in all_[-1].fields)))


@pytest.mark.parametrize("pack", data.PACKS)
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_resume_at_every_step(build, pack, repeat, share):
    dataset = build(pack=pack, repeat=repeat, share=share)
    steps = dataset.batches or 25
    iterator, states, expected = dataset.train(), [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(iterator.get_state())))
        expected.append(next(iterator))
    states.append(iterator.get_state())
    if dataset.batches:
        with pytest.raises(StopIteration):
            next(iterator)
    for step, state in enumerate(states):
        again = build(pack=pack, repeat=repeat, share=share).train()
        again.set_state(state)
        assert again.get_state() == state
        for want in expected[step : step + 3]:
            same(next(again), want)
    # Back in the same iterator, then to the end.
    iterator.set_state(states[2])
    for want in expected[2:]:
        same(next(iterator), want)
    assert iterator.get_state() == states[-1]


def test_resume_on_other_processes_and_batch_size(build):
    one = build(repeat=True).train()
    expected = stack([next(one) for _ in range(20)])
    one.set_state({**one.get_state(), "rows": 0})
    for _ in range(3):
        next(one)
    state = one.get_state()
    parts = [build(repeat=True, share=(i, 2), batch=10).train() for i in range(2)]
    for part in parts:
        part.set_state(state)
    got = stack([stack([next(p) for p in parts]) for _ in range(4)])
    same(got, Batch(*(f[18:58] for f in expected.fields)))


def test_seed_decides_the_order_and_nothing_else(build):
    a, b, again = (stack(list(build(seed=s).train())) for s in (0, 1, 0))
    same(a, again)
    assert not np.array_equal(a.tokens, b.tokens)
    assert sorted(a.targets[a.weights > 0]) == sorted(b.targets[b.weights > 0])
    # A stream is cut at the same places whatever the seed; only the order of the rows differs.
    a, b = (stack(list(build(seed=s, pack="stream").train())).tokens.tolist() for s in (0, 1))
    assert a != b
    assert sorted(a) == sorted(b)


def test_repeat_goes_on_with_another_order(build):
    once = build()
    rows = -(-once.train_tokens // 16)
    many = build(repeat=True)
    assert many.batches is None
    read = stack(batches(many, -(-3 * rows // 6)))
    epochs = [Batch(*(f[e * rows : (e + 1) * rows] for f in read.fields)) for e in range(3)]
    first = stack(list(once.train()))
    same(epochs[0], Batch(*(f[:rows] for f in first.fields)))
    for epoch in epochs:
        assert epoch.weights.sum() == once.train_tokens
        assert sorted(epoch.targets[epoch.weights > 0]) == sorted(first.targets[first.weights > 0])
    assert epochs[0].tokens.tolist() != epochs[1].tokens.tolist()


@pytest.mark.parametrize("pack", data.PACKS)
def test_heldout_is_the_whole_split_always(build, corpus, pack):
    dataset = build(pack=pack, tokenizer="bpe:300")
    first, second = (
        list(dataset.heldout()),
        list(build(pack=pack, tokenizer="bpe:300", seed=9).heldout()),
    )
    same(stack(first), stack(second))
    rows = stack(first)
    assert all(b.tokens.shape == (6, 16) for b in first)
    text = sum(len(d.text.encode()) for d in corpus.heldout)
    assert rows.bytes.sum() == text
    assert rows.weights.sum() == sum(len(dataset.tokenizer.encode(d.text)) for d in corpus.heldout)
    assert (rows.weights[rows.targets == dataset.tokenizer.eos] == 0).all()
    some = list(dataset.heldout(100))
    assert len(some) == 2
    assert stack(some).weights.sum() <= 7 * 16
    same(some[0], first[0])


def test_heldout_of_a_character_stream_is_consecutive_windows(build, make_corpus):
    text = "".join(texts(5, 2))
    corpus = make_corpus([(text, 0)], [(text[::-1], 0)])
    dataset = build(of=corpus, tokenizer="char", pack="random_crop", seq=10)
    assert dataset.tokenizer.eos is None
    rows = stack(list(dataset.heldout()))
    ids = dataset.tokenizer.encode(text[::-1])
    windows = {tuple(ids[i : i + 11]) for i in range(0, len(ids) - 1, 10)}
    seen = set()
    for tokens, targets, weights in zip(rows.tokens, rows.targets, rows.weights, strict=True):
        n = int(weights.sum())
        if n:
            seen.add((*tokens[:n].tolist(), targets[n - 1]))
    assert seen == windows
    assert rows.weights.sum() == len(ids) - 1


def test_random_crops_cover_the_stream_evenly(build, make_corpus):
    corpus = make_corpus([("".join(map(chr, range(0x100, 0x100 + 40))), 0)])
    dataset = build(of=corpus, tokenizer="char", pack="random_crop", seq=8, batch=100)
    assert dataset.batches is None
    ids = dataset.tokenizer.encode(corpus.train[0].text)
    rows = stack(batches(dataset, 30))
    starts = rows.tokens[:, 0] - ids[0]
    assert (rows.tokens - ids[0] == starts[:, None] + np.arange(8)).all()
    assert (rows.targets == rows.tokens + 1).all()
    counts = np.bincount(starts, minlength=32)
    assert len(counts) == 32  # 39 targets hold 32 places for a row of 8
    assert np.abs(counts - 3000 / 32).max() < 5 * np.sqrt(3000 / 32)
    exact = build(of=corpus, tokenizer="char", pack="random_crop", seq=39)
    same(next(exact.train()), stack([next(exact.train())]))
    with pytest.raises(ValueError, match=r"data.seq: a crop of 40 does not fit the 39 targets"):
        build(of=corpus, tokenizer="char", pack="random_crop", seq=40)


def test_text_has_the_form_of_heldout(build, make_corpus):
    text = texts(5, 4)[4]
    dataset = build(of=make_corpus([("abc def", 0)], [(text, 0)]))
    by_row = lambda b: sorted(map(tuple, b.tokens.tolist()))  # noqa: E731
    ours, held = stack(list(dataset.text(text))), stack(list(dataset.heldout()))
    assert by_row(ours) == by_row(held)
    assert ours.bytes.sum() == len(text.encode()) == ours.weights.sum()
    assert ours.tokens[0, 0] == 256
    with pytest.raises(ValueError, match="text: 0 characters"):
        dataset.text("")


def test_what_is_handed_out_is_the_readers_own(build):
    iterator = build(repeat=True).train()
    batch = next(iterator)
    for field in batch.fields:
        assert field.flags.writeable
        assert field.flags.c_contiguous


def test_manifest(build, corpus):
    dataset = build(tokenizer="bpe:280")
    assert dataset.manifest["hash"] == corpus.manifest["hash"]
    assert dataset.manifest["tokenizer_hash"] == dataset.tokenizer.hash
    assert dataset.manifest["vocab"] == dataset.vocab == 280
    json.dumps(dataset.manifest)
    assert dataset.domains == ("a", "b")


def test_errors(build, make_corpus, corpus):
    for fields, message in [
        ({"seq": 1}, "seq: a row holds at least 2 tokens, got 1"),
        ({"batch": 0}, "batch: must be positive, got 0"),
        ({"pack": "x"}, "pack: 'x' is none of documents, stream, random_crop"),
        ({"tokenizer": "words"}, "tokenizer: 'words' is not bytes, char"),
        ({"share": (0, 4)}, "data.batch: 6 rows do not divide over 4 processes"),
        ({"share": (2, 2)}, "process_index: 2 is not below 2 processes"),
        ({"seed": -1}, "seed: must not be negative, got -1"),
        ({"of": make_corpus([("", 0)])}, "has no training text"),
        ({"of": make_corpus([("abc", 0)], [])}, "has no held-out text"),
    ]:
        with pytest.raises(ValueError, match=message) as e:
            build(**fields)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="limit_tokens: must be positive, got 0"):
        build().heldout(0)
    state = build().train().get_state()
    for fields, name in [({"seed": 1}, "seed"), ({"seq": 17}, "seq"), ({"pack": "stream"}, "pack")]:
        with pytest.raises(ValueError, match=rf"data.{name}: cursor has .*, run has "):
            build(**fields).train().set_state(state)


def test_config_is_frozen_and_plain():
    config = data.Config(source="text_folder:/x", seq=8)
    assert config.to_dict()["source"] == "text_folder:/x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seq = 9


@pytest.mark.parametrize(
    ("tokenizer", "pack", "vocab"), [("bpe:280", "documents", 280), ("char", "random_crop", None)]
)
def test_load_a_folder_twice(tmp_path, tokenizer, pack, vocab):
    folder = tmp_path / "text"
    for domain in ("x", "y"):
        (folder / domain).mkdir(parents=True)
        for i, text in enumerate(texts(12, int(domain == "x"), 4000)):
            (folder / domain / f"{i}.txt").write_text(text, encoding="utf-8")
    config = data.Config(
        source=f"text_folder:{folder}",
        tokenizer=tokenizer,
        pack=pack,
        seq=32,
        batch=4,
        cache=str(tmp_path / "cache"),
    )
    first, second = data.load(config, seed=0), data.load(config, seed=0)
    assert first.domains == ("x", "y")
    assert first.vocab == second.vocab == (vocab or len(set("".join(WORDS) + " ")))
    assert first.tokenizer.hash == second.tokenizer.hash
    for a, b, _ in zip(first.train(), second.train(), range(5), strict=False):
        same(a, b)
    same(stack(list(first.heldout())), stack(list(second.heldout())))


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path))
    assert data.cache_dir() == tmp_path
    assert data.cache_dir("/elsewhere").as_posix() == "/elsewhere"
    monkeypatch.delenv("SPARSE_PRETRAIN_CACHE")
    assert data.cache_dir().parts[-2:] == (".cache", "sparse_pretrain")


def cost_of_a_batch(corpus, folder):
    """Seconds of CPU, the best of five, since neighbours on the machine also cost."""
    dataset = pipeline.build(
        data.Config(tokenizer="bytes", repeat=True, seq=256, batch=32), corpus, folder, seed=0
    )
    iterator = dataset.train()
    next(iterator)
    costs = []
    for _ in range(5):
        before = time.process_time()
        for _ in range(40):
            next(iterator)
        costs.append((time.process_time() - before) / 40)
    return min(costs)


@pytest.mark.slow  # a timing, which neighbours on the machine move
def test_a_batch_costs_little_cpu(make_corpus, tmp_path):
    text = " ".join(texts(4000, 5))
    corpus = make_corpus([(text[i : i + 700], 0) for i in range(0, len(text), 700)])
    # a process of its own checks no annotations, which here cost more than the work
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(cost_of_a_batch, (corpus, tmp_path)) < 2e-3
