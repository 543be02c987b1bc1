"""Tokenizers: every byte of text is charged once, files round-trip, training is deterministic."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sparse_pretrain.data import tokenize

TEXT = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 3,
    "The quick brown fox — naïve café, 12345 times.\r\n\tTabs\n" * 3,
    "日本語のテキスト 🙂🙃 emoji и кириллица\n" * 3,
]


def trained(model, trainer, pre, normalizer=None, decoder=None):
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre
    if normalizer is not None:
        inner.normalizer = normalizer
    if decoder is not None:
        inner.decoder = decoder
    inner.train_from_iterator(TEXT, trainer)
    return inner


def files():
    """Tokenizers of the kinds found in the wild: byte-level, WordPiece, Unigram, byte fallback."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    quiet = {"show_progress": False}
    gpt2 = trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], **quiet
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoder=decoders.ByteLevel(),
    )
    gpt2.post_processor = processors.ByteLevel(trim_offsets=True)
    bert = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], **quiet),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    )
    bert.enable_padding(length=64)
    bert.enable_truncation(4)
    unigram = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", **quiet
        ),
        pre_tokenizers.Metaspace(),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]),
    )
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "a": 257, "<unk>": 258}
    fallback = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    fallback.normalizer = normalizers.Replace(" ", "▁")
    return {"gpt2": gpt2, "bert": bert, "unigram": unigram, "fallback": fallback}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("files")
    for name, inner in files().items():
        inner.save(str(where / f"{name}.json"))
    return where


SPECS = ("bytes", "char", "bpe:300", "gpt2", "bert", "unigram", "fallback")


@pytest.fixture
def build(make_corpus, folder, tmp_path):
    def make(spec, documents=True, texts=TEXT):
        corpus = make_corpus([(t, 0) for t in texts])
        spec = f"file:{folder / spec}.json" if (folder / f"{spec}.json").exists() else spec
        return tokenize.make(spec, corpus, tmp_path, documents=documents)

    return make


@pytest.fixture(scope="module")
def everyone(folder, tmp_path_factory):
    """All tokenizers by spec; `char` over the characters the strategies below draw."""
    cache = tmp_path_factory.mktemp("cache")
    inner = {name: tokenize.read(folder / f"{name}.json", documents=True) for name in SPECS[3:]}
    from sparse_pretrain.data.corpus import Corpus, Document

    corpus = Corpus("m", ("a",), {"hash": "0"}, [Document(t, 0, "") for t in TEXT], [])
    return inner | {spec: tokenize.make(spec, corpus, cache) for spec in SPECS[:3]}


any_text = st.one_of(
    st.text(max_size=60),
    st.text(st.sampled_from("aé日🙂🏽\u0301\u200d\u00a0  \n\tﬁ"), max_size=40),
    st.lists(st.sampled_from(["def f", "    ", "\n", "<|endoftext|>", "café", "🙂", "[SEP]"])).map(
        "".join
    ),
)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_of_tokens_sum_to_the_text(everyone, spec, data):
    tokenizer = everyone[spec]
    known = st.text(st.sampled_from(sorted(set("".join(TEXT)))), max_size=60)
    text = data.draw(known if spec == "char" else any_text)
    ids, widths = tokenizer.spans(text)
    assert ids.dtype == np.int32
    assert ids.shape == widths.shape
    assert (widths >= 0).all()
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    if len(ids):
        assert widths.sum() == len(text.encode())
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab
    else:  # only a tokenizer that strips blanks can leave nothing
        assert not text or spec in ("bert", "unigram")
    if spec in ("bytes", "char", "bpe:300"):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos not in ids


def test_byte_level_widths_are_the_bytes_of_each_token(everyone):
    # Oracle: undo GPT-2's byte table on each token's name and join the bytes.
    tokenizer = everyone["bpe:300"]
    table, spare = {}, 256
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174:
            table[chr(b)] = b
        else:
            table[chr(spare)] = b
            spare += 1
    for text in (*TEXT, "🙂日é" * 5):
        ids, widths = tokenizer.spans(text)
        pieces = [bytes(table[c] for c in tokenizer.inner.id_to_token(int(i))) for i in ids]
        assert b"".join(pieces) == text.encode()
        assert [len(p) for p in pieces] == widths.tolist()
    assert tokenizer.spans("🏽")[1].tolist() in ([1, 1, 1, 1], [2, 1, 1], [2, 2], [3, 1], [4])


def test_offsets_charge_dropped_text_to_the_next_token():
    inner = tokenizers.Tokenizer(
        models.WordLevel({"the": 0, "café": 1, "[UNK]": 2}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, widths = tokenize.Tokenizer(inner, None).spans("  The   CAFÉ 日 ")
    assert ids.tolist() == [0, 1, 2]
    assert widths.tolist() == [2 + 3, 3 + 5, 1 + 3 + 1]


def test_bpe_is_deterministic_cached_and_exact(build, tmp_path):
    first = build("bpe:300")
    cached = list((tmp_path / "tokenizers").iterdir())
    assert len(cached) == 1
    second = build("bpe:300")
    cached[0].unlink()
    third = build("bpe:300")
    assert first.hash == second.hash == third.hash
    assert first.vocab == second.vocab == 300
    assert first.eos == 0
    assert first.hash != build("bpe:290").hash
    assert first.hash != build("bpe:300", texts=TEXT[:2]).hash
    assert not [p for p in (tmp_path / "tokenizers").iterdir() if p.name.startswith(".")]


def test_bpe_keeps_indentation_with_the_line_break(build):
    tokenizer = build("bpe:400", texts=["if x:\n        y = 1\n        z = 2\n" * 50])
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("if x:\n        y = 1\n")]
    assert ":\n       " in pieces
    assert " y" in pieces


def test_bytes_are_bytes(build):
    tokenizer = build("bytes")
    assert (tokenizer.vocab, tokenizer.eos) == (257, 256)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 256, 0xFF]) == "��"
    assert build("char").vocab == len(set("".join(TEXT)) | set("held out text")) + 1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("documents", [True, False])
def test_saved_file_reads_back_the_same(build, tmp_path, spec, documents):
    tokenizer = build(spec, documents)
    tokenizer.save(tmp_path / "saved" / "tokenizer.json")
    again = tokenize.read(tmp_path / "saved" / "tokenizer.json")
    assert (again.vocab, again.eos, again.hash) == (tokenizer.vocab, tokenizer.eos, tokenizer.hash)
    assert type(again) is type(tokenizer)
    for text in TEXT:
        for ours, theirs in zip(tokenizer.spans(text), again.spans(text), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # Hugging Face reads it too, and gives the same ids.
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    ids = plain.encode(TEXT[0], add_special_tokens=False).ids
    assert ids == tokenizer.encode(TEXT[0]).tolist()


def test_eos_of_files(build, folder, tmp_path):
    assert build("gpt2").eos == 0
    assert build("bert").inner.id_to_token(build("bert").eos) == "[SEP]"
    assert build("unigram").inner.id_to_token(build("unigram").eos) == "</s>"
    without = build("fallback", documents=False)
    assert (without.eos, without.vocab) == (None, 259)
    added = build("fallback")
    assert (added.eos, added.vocab) == (259, 260)
    named = tmp_path / "named"
    named.mkdir()
    (named / "tokenizer.json").write_text((folder / "fallback.json").read_text())
    (named / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert tokenize.read(named / "tokenizer.json").eos == 257


def test_char_on_tiny_shakespeare_has_65_symbols(make_corpus, tmp_path):
    root = os.environ.get("SPARSE_PRETRAIN_DATA")
    path = Path(root or ".") / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("needs karpathy/char-rnn data/tinyshakespeare/input.txt")
    text = path.read_text()
    cut = int(len(text) * 0.9)
    corpus = make_corpus([(text[:cut], 0)], [(text[cut:], 0)])
    stream = tokenize.make("char", corpus, tmp_path, documents=False)
    assert (stream.vocab, stream.eos) == (65, None)
    # nanoGPT's prepare.py: stoi over the sorted set of characters.
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    assert stream.encode(text[:1000]).tolist() == [stoi[c] for c in text[:1000]]
    assert tokenize.make("char", corpus, tmp_path, documents=True).vocab == 66


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "'words' is not bytes, char, bpe:SIZE or file:PATH"),
        ("bpe:", "'bpe:' is not"),
        ("bpe:x", "'bpe:x' is not"),
        ("bpe:256", "bpe:256 is below 257"),
        ("file:/no/such/file.json", "cannot read /no/such/file.json: No such file"),
    ],
)
def test_bad_specs(build, spec, message):
    with pytest.raises(ValueError, match=message) as e:
        build(spec)
    assert "\n" not in str(e.value)
    assert str(e.value).startswith("data.tokenizer: ")


def test_bad_files(build, tmp_path):
    path = tmp_path / "x.json"
    for text, message in [
        ("{", "no tokenizer.json"),
        ("{}", "no tokenizer.json"),
        (tokenizers.Tokenizer(models.BPE()).to_str(), "empty vocabulary"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as e:
            build(f"file:{path}")
        assert "\n" not in str(e.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read"):
        build(f"file:{path}")
    with pytest.raises(ValueError, match="cannot read"):
        build(f"file:{tmp_path}")


def test_char_names_what_it_does_not_know(build):
    with pytest.raises(ValueError, match="not 'ß'"):
        build("char").encode("aß")
