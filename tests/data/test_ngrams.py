"""Rows of memories: against Python's own big integers and Unicode tables, one token at a time."""

import re
import unicodedata

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from sparse_pretrain import data
from sparse_pretrain.data import ngrams, pipeline, tokenize
from sparse_pretrain.model import engram
from sparse_pretrain.shapes import Batch

MEMORY = engram.Config(layers=(1, 4), orders=(2, 3), heads=3, width=12, rows=1000)
WORDS = ["<|endoftext|>", "e", "E", " É ", "é", "e\u0301", "ﬁ", "FI", " ", "\n\n \t", "Ⅳ", "iv",
         "ß", "ab", "\t ab", "", "ÅB", "x\ny", "X  Y", "\u00a0"]  # fmt: skip


def words():
    """A tokenizer of these words, as they are."""
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, WORDS[0]))
    inner.decoder = decoders.Fuse()
    return tokenize.Tokenizer(inner, eos=0)


def alike(text):
    """What a token's text is compared as, by the standard library."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    text = re.sub(r"[ \t\r\n]+", " ", text)
    return " " if text == " " else text.strip()


def primes(start, count, used):
    """The next primes by trial of every divisor."""
    found, n = [], start
    while len(found) < count:
        if n not in used and all(n % d for d in range(2, n)):
            found.append(n)
            used.add(n)
        n += 1
    return found


def one_by_one(config, ids, pad, tokens, segments):
    """Every row of every token, in Python's integers, which have no end."""
    used, out = set(), []
    vocab = max(ids) + 1
    for layer in config.layers:
        most = (2**63 - 1) // vocab // 2
        drawn = np.random.default_rng(10007 * layer).integers(0, most, max(config.orders))
        odd = [2 * int(x) + 1 for x in drawn]
        begin = 0
        for order in config.orders:
            for size in primes(config.rows, config.heads, used):
                rows = []
                for line, own in zip(tokens.tolist(), segments.tolist(), strict=True):
                    row = []
                    for t in range(len(line)):
                        mixed = 0
                        for back in range(order):
                            inside = t >= back and own[t - back] == own[t]
                            here = ids[line[t - back]] if inside else pad
                            mixed ^= here * odd[back]
                        assert 0 <= mixed < 2**63
                        row.append(mixed % size + begin)
                    rows.append(row)
                out.append(rows)
                begin += size
    return np.moveaxis(np.array(out), 0, -1)


def packed(rng, vocab, rows=3, length=20):
    """Tokens, and documents of several lengths, padding at the end of the last row."""
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    segments = 1 + np.cumsum(rng.random((rows, length)) < 0.25, axis=1).astype(np.int32)
    segments[-1, -4:] = 0
    return tokens, segments


def test_tokens_that_read_alike_are_one():
    ids = ngrams.compressed(words())
    names = [alike(w) or w for w in WORDS]
    same = np.array([[a == b for b in names] for a in names])
    np.testing.assert_array_equal(ids[:, None] == ids[None], same)
    assert sorted(set(ids.tolist())) == list(range(len(set(names))))
    # bytes above 127 are parts of characters, each its own; letters lose their case
    ids = ngrams.compressed(tokenize.Bytes())
    assert len(set(ids[128:256].tolist())) == 128
    assert ids[ord("A")] == ids[ord("a")] != ids[ord("b")]
    assert ids[ord("\n")] == ids[ord(" ")] != ids[ord("_")]


@pytest.mark.parametrize("orders", [(2, 3), (2, 3, 4), (3,)])
def test_rows_are_those_of_exact_integers(orders, rng):
    config = engram.Config(layers=(1, 4), orders=orders, heads=2, width=24, rows=200)
    tokenizer = words()
    found = ngrams.addresses(config, tokenizer)
    tokens, segments = packed(rng, tokenizer.vocab)
    rows = found.rows(tokens, segments)
    ids = ngrams.compressed(tokenizer)
    pad = int(ids[0])
    np.testing.assert_array_equal(rows, one_by_one(config, ids.tolist(), pad, tokens, segments))
    assert rows.dtype == np.int32
    assert all(m % 2 for m in found.multipliers.ravel().tolist())
    # and the same from the last tokens alone, where there are no 64-bit numbers
    last = max(orders)
    for b, t in ((0, 0), (1, 7), (2, 11)):
        seen = [
            ids[tokens[b, t - k]] if t >= k and segments[b, t - k] == segments[b, t] else pad
            for k in range(last)
        ]
        got = jax.jit(engram.hashed, static_argnums=0)(
            config, found.on_device(), np.array([seen], np.int32)
        )
        np.testing.assert_array_equal(got[0], rows[b, t])


def test_halves_of_large_products_are_those_of_exact_integers(rng):
    config = engram.Config(layers=(0,), orders=(2, 8), heads=1, width=2, rows=2**29)
    ids = rng.integers(0, 2**24, (40, 8)).astype(np.int32)
    odd = rng.integers(0, 2**38, (1, 8)) * 2 + 1
    found = ngrams.Addresses(config, np.array([0]), odd, 0)
    got = engram.hashed(config, found.on_device(), ids)
    for row, mine in zip(ids.tolist(), np.asarray(got).tolist(), strict=True):
        mixed, begin = 0, 0
        for i, (order, size) in enumerate(zip((2, 8), engram.tables(config)[0], strict=True)):
            mixed = 0
            for x, m in zip(row[:order], odd[0].tolist(), strict=False):
                mixed ^= x * m
            assert mine[i] == mixed % size + begin
            begin += size


def test_a_document_does_not_read_the_one_before_it(rng):
    tokenizer = words()
    found = ngrams.addresses(MEMORY, tokenizer)
    tokens, segments = packed(rng, tokenizer.vocab)
    rows = found.rows(tokens, segments)
    changed = tokens.copy()
    changed[:, :9] = (changed[:, :9] + 1) % tokenizer.vocab
    after = segments > segments[:, 8:9]  # documents that begin later than what was changed
    assert after.any()
    np.testing.assert_array_equal(found.rows(changed, segments)[after], rows[after])
    assert not np.array_equal(found.rows(changed, segments), rows)


def test_every_batch_carries_rows(tmp_path):
    (tmp_path / "a.txt").write_text("Ein Beispiel. " * 200)
    (tmp_path / "b.txt").write_text("Noch eins, und länger. " * 200)
    plain = data.Config(
        source=f"text_folder:{tmp_path}", tokenizer="bytes", seq=16, batch=3,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    loaded = data.load(plain, seed=0, memory=MEMORY)
    assert isinstance(loaded.addresses, ngrams.Addresses)
    every = [next(loaded.train()), next(iter(loaded.heldout())), next(iter(loaded.text("abc def")))]
    for batch in every:
        assert batch.memory.shape == (3, 16, MEMORY.carried)
        rows = loaded.addresses.rows(batch.tokens, batch.segments)
        np.testing.assert_array_equal(batch.memory, rows)
    without = next(data.load(plain, seed=0).train())
    assert without.memory is None
    for name, a, b in zip(Batch._fields[:-1], without.fields, every[0].fields, strict=True):
        np.testing.assert_array_equal(a, b, name)
    assert data.load(plain, seed=0, memory=engram.Config()).addresses is None
    assert pipeline.Dataset.addresses is None
    made = data.load(
        data.Config(source="synthetic:copy", seq=40, batch=2), seed=0, memory=MEMORY
    )
    assert next(made.train()).memory.shape == (2, 40, MEMORY.carried)
    assert next(iter(made.heldout())).memory.shape == (2, 40, MEMORY.carried)
