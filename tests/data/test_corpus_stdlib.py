"""The built standard-library corpus: what it holds, what it leaves out, and how it is split."""

import hashlib
import json
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest

from sparse_pretrain.data import corpus, dedup, heldout
from sparse_pretrain.data.sources import base, packages, stdlib

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def built(cache):
    return corpus.open_corpus("python_stdlib", cache)


@pytest.fixture(scope="session")
def texts(built):
    return {
        "train": [d._replace(text=d.text) for d in built.train],
        "heldout": [d._replace(text=d.text) for d in built.heldout],
    }


def test_second_build_elsewhere_is_the_same(built, tmp_path):
    again = corpus.open_corpus("python_stdlib", tmp_path)
    assert again.manifest == built.manifest
    assert list(again.heldout) == list(built.heldout)
    assert [d.name for d in again.train] == [d.name for d in built.train]


def test_hash_is_of_every_document_and_of_nothing_else(built, texts):
    sha = hashlib.sha256()
    for split in ("train", "heldout"):
        for d in texts[split]:
            for field in (built.domains[d.domain], d.name, split, d.text):
                data = field.encode()
                sha.update(len(data).to_bytes(8, "little") + data)
    assert built.manifest["hash"] == sha.hexdigest()[:16]
    assert str(LIBRARY) not in json.dumps(built.manifest)


def test_manifest_counts_what_is_there(built, texts):
    for i, name in enumerate(built.domains):
        mine = {s: [d for d in texts[s] if d.domain == i] for s in texts}
        assert built.manifest["domains"][name] == {
            "documents": sum(map(len, mine.values())),
            "train_bytes": sum(len(d.text.encode()) for d in mine["train"]),
            "heldout_bytes": sum(len(d.text.encode()) for d in mine["heldout"]),
        }
    assert built.manifest["source"] == built.name == "python_stdlib"
    assert built.manifest["python"].split(".")[:2] == [str(v) for v in sys.version_info[:2]]


def test_at_least_four_domains_each_with_a_fair_share(built):
    domains = built.manifest["domains"]
    sizes = {name: d["train_bytes"] + d["heldout_bytes"] for name, d in domains.items()}
    total = sum(sizes.values())
    assert len(domains) >= 4
    assert total > 7_000_000
    for name, size in sizes.items():
        assert 0.03 < size / total < 0.5, name
        assert 0.05 <= domains[name]["heldout_bytes"] / size <= 0.081, name


def test_every_large_module_is_there_but_no_test(texts):
    names = {d.name for split in texts.values() for d in split}
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py", "typing.py"} <= names
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")), name
    assert not [name for name in names if name.startswith(("_sysconfigdata", "config-"))]


def test_train_text_is_the_files_text(texts):
    for d in texts["train"][::40]:
        if d.name.endswith(".py"):
            with tokenize.open(LIBRARY / d.name) as file:
                assert file.read().startswith(d.text), d.name


def test_tables_are_capped(built, texts):
    for area, cap in stdlib.CAPS.items():
        kept = sum(
            len(d.text) for s in texts.values() for d in s if f"{d.name}/".startswith(f"{area}/")
        )
        assert 0 < kept <= cap
    assert built.manifest["notes"]["caps"]["encodings, characters"] == stdlib.CAPS["encodings"]


def test_overlap_is_what_a_set_of_strings_says(built, texts):
    """Every 50-character string of both sides as a Python string: no hash of ours."""
    wanted = {d.text[i : i + 50] for d in texts["heldout"] for i in range(len(d.text) - 49)}
    shared = set()
    for d in texts["train"]:
        shared.update(wanted.intersection(d.text[i : i + 50] for i in range(len(d.text) - 49)))
    covered = total = 0
    for d in texts["heldout"]:
        mask = np.zeros(len(d.text), bool)
        for i in range(len(d.text) - 49):
            if d.text[i : i + 50] in shared:
                mask[i : i + 50] = True
        covered += int(mask.sum())
        total += len(mask)
    assert built.manifest["overlap_50"] == round(covered / total, 6)
    assert built.manifest["overlap_50"] < 0.02
    assert built.manifest["notes"]["overlap_50_before_removal"] > 0.02


def test_no_near_duplicates_across_the_splits(tmp_path):
    """Exact Jaccard similarity of every held-out document, before lines go, with every other."""
    split = heldout.Split(stdlib.Stdlib().read(), tmp_path, fold=stdlib.Stdlib.fold)
    train = [np.unique(dedup.shingles(d.text)) for d in split.train()]
    owner = np.repeat(np.arange(len(train)), [len(s) for s in train])
    everything = np.concatenate(train)
    order = np.argsort(everything)
    everything, owner = everything[order], owner[order]
    sizes = np.bincount(owner, minlength=len(train))
    for d in [d for d in split._documents if d.heldout]:
        mine = np.unique(dedup.shingles(split._spool[d.slot]))
        left = np.searchsorted(everything, mine, "left")
        right = np.searchsorted(everything, mine, "right")
        hits = np.concatenate([owner[a:b] for a, b in zip(left, right, strict=True)])
        common = np.bincount(hits, minlength=len(train))
        similarity = common / (sizes + len(mine) - common)
        # 0.5 of the estimate, plus four of its standard errors
        assert similarity.max() < 0.68, d.name
    split.close()


def test_cached_open_is_silent_and_imports_nothing_heavy(built, cache):
    program = (
        "import sys, pathlib; from sparse_pretrain.data import corpus\n"
        f"c = corpus.open_corpus('python_stdlib', pathlib.Path({str(cache)!r}))\n"
        "heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'grain', 'rich'} & set(sys.modules)\n"
        "print(c.manifest['hash'], sorted(heavy))\n"
        "c.train[0]; c.heldout[-1]\n"
        "print('tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"{built.manifest['hash']} []", "False"]
    assert done.stderr == ""


def test_is_a_tfds_builder(built, texts, tmp_path):
    import tensorflow_datasets as tfds

    from sparse_pretrain.data import builder
    from sparse_pretrain.data.sources import prepared

    made = tfds.builder("python_stdlib", data_dir=tmp_path, file_format="array_record")
    assert isinstance(made, builder.PythonStdlib)
    with prepared.quiet_tfds():
        made.download_and_prepare()
    for split, documents in texts.items():
        rows = made.as_data_source(split)
        assert len(rows) == len(documents)
        for row, d in zip(rows, documents, strict=True):
            fields = [row[key].decode() for key in ("text", "domain", "name")]
            assert fields == [d.text, built.domains[d.domain], d.name]


def test_packages_add_areas_to_the_library(tmp_path, monkeypatch):
    names = {"rich", "ml-collections", "absl-py", "requests"}
    every = packages.Packages._distributions
    monkeypatch.setattr(
        packages.Packages,
        "_distributions",
        lambda self: [(name, d) for name, d in every(self) if name in names],
    )
    monkeypatch.setattr(packages, "MOST", 900_000)
    made = packages.Packages()
    assert made.fingerprint() == packages.Packages().fingerprint()
    raws = list(made.read())
    library = list(stdlib.Stdlib().read())
    assert raws[: len(library)] == library
    added = raws[len(library) :]
    assert {r.name.split("/")[0] for r in added} <= names
    assert sum(len(r.text) for r in added if not r.name.endswith("/description")) < 900_000
    assert {"graphics", "libraries"} <= {r.domain for r in added}
    for r in added:
        assert not {"test", "tests", "testing"} & set(r.name.split("/")), r.name
    assert set(made.notes["distributions"]) == {n for n, _ in made._distributions()}
    assert made.notes["dropped"]["files of the largest distributions"] > 0


@pytest.mark.slow
def test_packages_build_whole(tmp_path):
    whole = corpus.open_corpus("python_packages", tmp_path)
    assert whole.manifest["train_bytes"] > 30_000_000
    assert whole.manifest["overlap_50"] < 0.02
    for name, d in whole.manifest["domains"].items():
        assert 0.03 < d["heldout_bytes"] / (d["train_bytes"] + d["heldout_bytes"]) < 0.081, name


def test_share_out_cuts_only_the_largest():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 50, rng.integers(1, 8)).tolist()
        most = int(rng.integers(1, 300))
        level = packages.share_out(sizes, most)
        used = [sum(min(s, candidate) for s in sizes) for candidate in range(max(sizes) + 1)]
        assert level == max(c for c, u in enumerate(used) if u <= most)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("pkg/tests/a.py", True),
        ("pkg/internal_test_util/a.py", True),
        ("pkg/test_a.py", True),
        ("pkg/a_test.py", True),
        ("pkg/conftest.py", True),
        ("pkg/attestation/latest.py", False),
        ("pkg/contest.py", False),
    ],
)
def test_tests_are_known_by_their_path(path, expected):
    assert base.is_test(Path(path).parts) is expected


def test_head_keeps_whole_lines():
    assert base.head("ab\ncd\nef", 7) == "ab\ncd\n"
    assert base.head("ab\ncd", 5) == "ab\ncd"
    assert base.head("abcd", 2) == ""
