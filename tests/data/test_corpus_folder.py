"""Text folders: formats, domains, splits and errors."""

import gzip
import json
import os
from pathlib import Path

import pytest

from sparse_pretrain.data import corpus, heldout
from tests.data.conftest import lines, write


def everything(made):
    return {d.name: (made.domains[d.domain], d.text) for d in (*made.train, *made.heldout)}


def test_every_format_and_nested_domains(root, cache):
    records = [json.dumps({"text": lines(i), "other": 1}) for i in range(10, 40)]
    source = write(
        root,
        {
            "a.txt": lines(0),
            "b.md": "\ufeff" + lines(1),
            "wiki/deep/er/c.py": lines(2).replace("\n", "\r\n"),
            "wiki/d.jsonl": "\n".join(records[:15]) + "\n\n",
            "wiki/e.txt.gz": lines(4),
            "news/f.jsonl.gz": "\n".join(records[15:]),
            "news/g.md.gz": lines(5),
            "news/h.py.gz": "# -*- coding: latin-1 -*-\n# é\n".encode("latin-1")
            + lines(6).encode(),
            "news/ignored.bin": b"\xff\xfe\x00",
            ".hidden/x.txt": "hidden",
            "empty.txt": "",
            "blank.txt": " \n ",
        },
    )
    made = corpus.open_corpus(source, cache)
    assert made.domains == ("news", "root", "wiki")
    found = everything(made)
    assert found["wiki/deep/er/c.py"] == ("wiki", lines(2))
    assert found["wiki/e.txt.gz"] == ("wiki", lines(4))
    assert found["wiki/d.jsonl:3"] == ("wiki", lines(12))
    assert found["news/f.jsonl.gz:1"] == ("news", lines(25))
    assert found["news/h.py.gz"][1].startswith("# -*- coding: latin-1 -*-\n# é\n")
    assert found["b.md"][1].startswith("w")
    assert len(found) == 36 + 2  # the two documents of `root` are too few: each gives its tail
    for name in ("a.txt", "b.md"):
        assert found[name][1] + found[f"{name} (tail)"][1] == lines("ab".index(name[0]))
    assert made.manifest["notes"]["split_by_tail"].keys() == {"root"}


def test_single_file_is_split_as_nanogpt_does(root, cache):
    text = "é" + lines(0, 3000)
    made = corpus.open_corpus(write(root, {"input.txt": text}), cache)
    assert "".join(d.text for d in made.train) == text[: int(0.9 * len(text))]
    assert "".join(d.text for d in made.heldout) == text[int(0.9 * len(text)) :]
    assert made.domains == ("root",)


def test_tinyshakespeare_has_the_published_sizes(cache):
    """nanoGPT's data/shakespeare_char/prepare.py prints 1,003,854 and 111,540 tokens."""
    folder = Path(os.environ.get("SPARSE_PRETRAIN_DATA", "/nonexistent")) / "tinyshakespeare"
    if not (folder / "input.txt").is_file():
        pytest.skip("SPARSE_PRETRAIN_DATA lacks tinyshakespeare (karpathy/char-rnn data)")
    made = corpus.open_corpus(f"text_folder:{folder}", cache)
    assert [len(d.text) for d in (*made.train, *made.heldout)] == [1_003_854, 111_540]


def test_single_long_file_becomes_several_records_that_join_to_it(root, cache, monkeypatch):
    from sparse_pretrain.data import builder

    monkeypatch.setattr(builder, "PIECE", 10_000)
    text = lines(0, 1000) + "x" * 30_000
    made = corpus.open_corpus(write(root, {"input.txt": text}), cache)
    assert len(made.train) > 5
    assert max(len(d.text) for d in made.train) <= 10_000
    assert "".join(d.text for d in (*made.train, *made.heldout)) == text


def test_large_files_are_cut_in_parts_and_repeats_go(root, cache):
    book = lines(0, 8000)
    files = {"a/book.txt": book + book, "b/other.txt": lines(1, 8000), "c/small.txt": lines(2)}
    made = corpus.open_corpus(write(root, files), cache)
    sizes = made.manifest["domains"]
    assert sizes["a"]["train_bytes"] + sizes["a"]["heldout_bytes"] < 1.15 * len(book)
    for name in "ab":
        whole = sizes[name]["train_bytes"] + sizes[name]["heldout_bytes"]
        assert 0.04 < sizes[name]["heldout_bytes"] / whole < 0.09
    assert made.manifest["notes"]["cut_in_parts"] == ["a", "b", "c"]
    assert made.manifest["overlap_50"] < 0.02
    for d in made.train:  # parts that stay neighbours are one document again
        assert d.text in files[f"{d.name.split('#')[0].split(' ')[0]}"]
    assert len(made.train) <= len(made.heldout) + 4


@pytest.mark.parametrize(
    ("names", "train", "held", "domains"),
    [
        (["train.txt", "val.txt"], [0], [1], ("root",)),
        (["train.jsonl", "valid.txt", "test.txt"], [0], [1], ("root",)),
        (["train/x/a.txt", "train/y/b.txt", "test/x/c.txt"], [0, 1], [2], ("x", "y")),
        (["train-00000.txt", "train-00001.txt", "heldout.txt.gz"], [0, 1], [2], ("root",)),
        (["extra.txt", "train.md", "validation.md"], [0, 1], [2], ("root",)),
    ],
)
def test_named_splits_are_kept_as_they_are(root, cache, names, train, held, domains):
    texts = [lines(7) + lines(i) for i in range(len(names))]  # overlapping, and still kept
    source = write(
        root,
        {
            name: json.dumps({"text": text}) if ".jsonl" in name else text
            for name, text in zip(names, texts, strict=True)
        },
    )
    made = corpus.open_corpus(source, cache)
    assert [d.text for d in made.train] == [texts[i] for i in train]
    assert [d.text for d in made.heldout] == [texts[i] for i in held]
    assert made.domains == domains
    assert made.manifest["overlap_50"] > 0.4


def test_near_duplicates_stay_on_one_side(root, cache):
    files = {}
    for i in range(120):
        text = lines(i)
        files[f"d/{i:03}-a.txt"] = text
        files[f"d/{i:03}-b.txt"] = text.replace("w1", "v1", 3)
        files[f"d/{i:03}-c.txt"] = text  # an exact copy goes
    made = corpus.open_corpus(write(root, files), cache)
    sides = {d.name[2:7]: "train" for d in made.train} | {d.name[2:7]: "held" for d in made.heldout}
    assert len(sides) == 240
    assert all(sides[f"{i:03}-a"] == sides[f"{i:03}-b"] for i in range(120))
    assert made.manifest["notes"]["exact_duplicates_dropped"] == 120
    assert made.manifest["notes"]["clusters"] == 120
    share = made.manifest["heldout_bytes"] / made.manifest["train_bytes"]
    assert 0.05 < share < 0.09


def test_documents_that_train_mostly_repeats_are_not_held_out(root, cache):
    """Each long document contains a short one whole: too unlike for a cluster, yet known."""
    files = {f"long{i}.txt": lines(i, 200) + lines(1000 + i) for i in range(60)}
    files |= {f"short{i}.txt": lines(1000 + i) for i in range(60)}
    files |= {f"own{i}.txt": lines(2000 + i, 200) for i in range(60)}
    made = corpus.open_corpus(write(root, files), cache)
    held = {d.name for d in made.heldout}
    assert sum(name.startswith("short") for name in held) < 0.2 * len(held)  # a third by chance
    assert all(d.text == files[d.name] for d in made.heldout if d.name.startswith("own"))
    assert made.manifest["overlap_50"] < 0.02
    assert "clusters_passed_over" in made.manifest["notes"]


def test_shared_lines_leave_the_held_out_side_only(root, cache):
    licence = "".join(
        f"Permission is hereby granted, free of charge, clause {i}\n" for i in range(6)
    )
    made = corpus.open_corpus(
        write(root, {f"{i}.txt": licence + lines(i) for i in range(100)}), cache
    )
    assert all(d.text.startswith(licence) for d in made.train)
    assert all(d.text == lines(int(d.name[:-4])) for d in made.heldout)
    assert made.manifest["overlap_50"] == 0
    assert made.manifest["notes"]["overlap_50_before_removal"] > 0.05


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no .txt, .md, .py, .jsonl"),
        ({"a.bin": "x"}, "no .txt, .md, .py, .jsonl"),
        ({"a.txt": "", "b.md": "\n"}, "2 files hold no text"),
        ({"a.txt": b"good\xff"}, r"cannot decode .*a\.txt: not UTF-8 at byte 4"),
        ({"b.py": b"x = '\xff'"}, r"cannot decode .*b\.py: not UTF-8"),
        ({"c.jsonl": '{"text": "x"}\n{"text": \n'}, r"c\.jsonl:2: not a JSON object"),
        ({"c.jsonl": '{"text": "x"}\n\n{"body": "x", "id": 1}'}, r"c\.jsonl:3: no .*body, id"),
        ({"c.jsonl": "[1]"}, r"c\.jsonl:1: no string field 'text' \(found: list\)"),
        ({"c.jsonl": '{"text": "\\ud800"}'}, r"c\.jsonl:1: .*surrogate"),
        ({"c.jsonl": b'{"text": "\xff"}'}, r"c\.jsonl:1: not a JSON object"),
        ({"a.txt": "x"}, r"too little text .*1 documents \(a\.txt\), 1 bytes"),
    ],
)
def test_errors_name_the_file_and_leave_nothing(root, cache, files, words):
    with pytest.raises(ValueError, match=words) as caught:
        corpus.open_corpus(write(root, files), cache)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"data.source='text_folder:{root}': ")
    assert not list(cache.glob("corpora/*"))


def test_broken_gzip_is_named(root, cache):
    write(root, {"ok.txt": lines(0)})
    (root / "cut.txt.gz").write_bytes(gzip.compress(lines(1).encode())[:-20])
    (root / "not.txt.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"data\.source=.*cannot read .*cut\.txt\.gz"):
        corpus.open_corpus(f"text_folder:{root}", cache)
    (root / "cut.txt.gz").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*not\.txt\.gz"):
        corpus.open_corpus(f"text_folder:{root}", cache)


def test_missing_folder_unknown_source_and_wrong_form(tmp_path, cache):
    (tmp_path / "file.txt").write_text("x")
    for source, words in [
        (f"text_folder:{tmp_path}/none", "no folder .*none"),
        (f"text_folder:{tmp_path}/file.txt", "is a file, not a folder"),
        ("text_folder:", "does not have the form text_folder:PATH"),
        ("text_folder", "does not have the form text_folder:PATH"),
        ("python_stdlib:3", "does not have the form python_stdlib"),
        ("wikipedia", "is unknown; known: python_stdlib, python_packages, text_folder:PATH"),
        ("synthetic", r"is unknown; known: .*, tfds:NAME\[/CONFIG\], synthetic:TASK$"),
    ]:
        with pytest.raises(ValueError, match=words):
            corpus.open_corpus(source, cache)
    assert not cache.exists()


def test_small_domains_fold_into_the_named_one(tmp_path):
    from sparse_pretrain.data.sources import Raw

    raws = [Raw(lines(i), "big" if i else "tiny", f"{i}") for i in range(60)]
    split = heldout.Split(raws, tmp_path, fold=("big", 0.03))
    assert split.domains == ("big",)
    assert split.notes["domains_folded"] == {"tiny": "big"}
    split.close()
