"""The cache of built corpora: rebuilt on change, whole or not used, safe for two builders,
and nothing kept open."""

import errno
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

from sparse_pretrain import data
from sparse_pretrain.data import builder, corpus, heldout, spool
from sparse_pretrain.data.sources import prepared
from tests.data.conftest import lines, write


def test_documents_are_a_sequence_and_pickle(root, cache):
    made = corpus.open_corpus(write(root, {f"{i}.txt": lines(i) for i in range(40)}), cache)
    documents = list(made.train)
    assert len(made.train) == len(documents)
    assert made.train[-1] == made.train[len(documents) - 1] == documents[-1]
    assert made.train[np.int64(3)] == documents[3]
    assert made.train[2:9:3] == documents[2:9:3]
    for index in (len(documents), -len(documents) - 1):
        with pytest.raises(IndexError):
            made.train[index]
    assert pickle.loads(pickle.dumps(made.train))[5] == documents[5]


def test_rebuilds_when_a_file_changes_and_only_then(root, cache, monkeypatch):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    first = corpus.open_corpus(source, cache)
    monkeypatch.setattr(corpus, "_build", None)
    assert corpus.open_corpus(source, cache).manifest == first.manifest
    monkeypatch.undo()
    for change in (
        lambda: (root / "3.txt").write_text(lines(99)),
        lambda: (root / "3.txt").rename(root / "x.txt"),
        lambda: (root / "4.txt").unlink(),
        lambda: write(root, {"sub/new.txt": lines(100)}),
    ):
        change()
        changed = corpus.open_corpus(source, cache)
        assert changed.manifest["hash"] != first.manifest["hash"]
        first = changed


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_whom_the_umask_lets_in_can_read_the_cache(mask, root, cache):
    """A run's dataset: the corpus, its tokenizer and its tokens, to the last file."""
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    config = data.Config(source=source, tokenizer="bpe:300", seq=8, batch=2, cache=str(cache))
    before = os.umask(mask)
    try:
        data.load(config, seed=0).tokenizer.save(cache / "tokenizer.json")
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in cache.rglob("*")}
    assert {path.parts[len(cache.parts)] for path in found} == {
        *("corpora", "tokenizers", "tokens", "tokenizer.json")
    }
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, (path, oct(mode))


def broken(folder, how):
    records = next(folder.glob("**/*train.array_record*"))
    if how == "no manifest":
        (folder / corpus.MANIFEST).unlink()
    elif how == "half a manifest":
        text = (folder / corpus.MANIFEST).read_text()
        (folder / corpus.MANIFEST).write_text(text[: len(text) // 2])
    elif how == "truncated records":
        os.truncate(records, 100)
    elif how == "no records":
        records.unlink()
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    "how", ["no manifest", "half a manifest", "truncated records", "no records", "empty folder"]
)
def test_half_a_cache_is_never_used(root, cache, how):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    first = corpus.open_corpus(source, cache)
    documents = list(first.train)
    (folder,) = (cache / "corpora").iterdir()
    broken(folder, how)
    again = corpus.open_corpus(source, cache)
    assert again.manifest == first.manifest
    assert list(again.train) == documents
    assert [p.name for p in (cache / "corpora").iterdir()] == [folder.name]


def test_build_cut_short_leaves_nothing(root, cache, monkeypatch):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_count", stop)
    with pytest.raises(KeyboardInterrupt):
        corpus.open_corpus(source, cache)
    assert not list((cache / "corpora").iterdir())
    monkeypatch.undo()
    assert len(corpus.open_corpus(source, cache).train)


def test_dead_builds_are_swept_after_a_day(root, cache):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    old, new = (cache / "corpora" / f"{corpus._BUILDING}{name}" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    corpus.open_corpus(source, cache)
    assert not old.exists()
    assert new.exists()


def open_hash(source, cache, queue):
    made = corpus.open_corpus(source, cache)
    queue.put((made.manifest["hash"], len(list(made.train))))


def test_two_builders_at_once(root, cache):
    source = write(root, {f"{i}.txt": lines(i) for i in range(60)})
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=open_hash, args=(source, cache, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1]
    assert len(list((cache / "corpora").iterdir())) == 1


def test_second_builder_keeps_the_first_ones_folder(root, cache):
    made = corpus.open_corpus(write(root, {f"{i}.txt": lines(i) for i in range(30)}), cache)
    (folder,) = (cache / "corpora").iterdir()
    shutil.copytree(folder, cache / "mine")
    before = folder.stat().st_ino
    corpus._place(cache / "mine", folder)
    assert folder.stat().st_ino == before
    assert len(list(made.train)) == len(made.train)


def test_full_disk_is_one_line_and_leaves_nothing(root, cache, monkeypatch):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"cannot write the corpus cache .*needs \d+ bytes, 1000"):
        corpus.open_corpus(source, cache)
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise RuntimeError(
            "Failed to finalize: write() failed: No space left on device;\nat byte 1"
        )

    monkeypatch.setattr(
        "sparse_pretrain.data.builder.TextBuilder.download_and_prepare", full, raising=True
    )
    with pytest.raises(OSError, match="cannot write the corpus cache") as caught:
        corpus.open_corpus(source, cache)
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert not list((cache / "corpora").iterdir())


def test_cache_that_cannot_be_a_folder(root, tmp_path):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write the corpus cache under .*file"):
        corpus.open_corpus(source, tmp_path / "file" / "cache")


def test_first_build_says_what_it_made_and_the_second_is_silent(root, cache, capfd):
    source = write(root, {f"{i}.txt": lines(i) for i in range(30)})
    made = corpus.open_corpus(source, cache)
    out, err = capfd.readouterr()
    assert out == ""
    assert "prepared text_folder" in err
    assert made.manifest["hash"] in err
    assert "overlap 0.0 %" in err
    corpus.open_corpus(source, cache)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def spools(monkeypatch):
    """Every spool that is made."""
    made = []

    class Kept(spool.Spool):
        def __init__(self, folder):
            super().__init__(folder)
            made.append(self)

    monkeypatch.setattr(spool, "Spool", Kept)
    return made


def test_a_split_that_fails_frees_its_spool(spools, tmp_path):
    with pytest.raises(ValueError, match="no readable text"):
        heldout.Split([], tmp_path)
    assert [s._file.closed for s in spools] == [True]


def test_a_builder_frees_the_split_it_makes(spools, root, tmp_path):
    write(root, {f"{i}.txt": lines(i) for i in range(30)})
    with prepared.quiet_tfds():
        made = builder.TextFolder(path=str(root), data_dir=tmp_path, file_format="array_record")
        made.download_and_prepare()
    assert len(made.as_data_source("train"))
    assert [s._file.closed for s in spools] == [True]
