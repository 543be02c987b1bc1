"""What tests of corpora share: one in memory, and text files with a cache to build them into."""

import gzip
import hashlib
import random

import pytest

from sparse_pretrain.data.corpus import Corpus, Document


@pytest.fixture
def make_corpus():
    """Corpus from (text, domain) pairs of both splits."""

    def make(train, heldout=(("held out text", 0),), domains=("a", "b")):
        train = [Document(text, domain, f"train{i}") for i, (text, domain) in enumerate(train)]
        heldout = [Document(text, domain, f"held{i}") for i, (text, domain) in enumerate(heldout)]
        identity = hashlib.sha256(repr((train, heldout)).encode()).hexdigest()[:16]
        sizes = {
            name: {"train_bytes": sum(len(d.text.encode()) for d in train if d.domain == i)}
            for i, name in enumerate(domains)
        }
        manifest = {"hash": identity, "source": "memory", "domains": sizes}
        return Corpus("memory", domains, manifest, train, heldout)

    return make


def lines(seed, count=40):
    """Text without a repeat: `count` lines of twelve words."""
    r = random.Random(seed)
    return "".join(
        " ".join(f"w{r.randrange(10**6)}" for _ in range(12)) + "\n" for _ in range(count)
    )


def write(root, files):
    """Writes name -> content under `root`, packed where the name ends in .gz; the source's name."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return f"text_folder:{root}"


@pytest.fixture
def root(tmp_path):
    """An empty folder for texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path):
    """Where corpora are built, not there yet."""
    return tmp_path / "cache"
