"""A corpus in memory, so that these tests need no files and no builder."""

import hashlib

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
