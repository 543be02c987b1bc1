"""Text from other TFDS datasets, tried on tiny ones that are defined here."""

import random

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparse_pretrain.data import corpus


def line(seed):
    r = random.Random(seed)
    return " ".join(str(r.randrange(10**6)) for _ in range(60))


class CorpusProbe(tfds.core.GeneratorBasedBuilder):
    """One config with a validation split, one without."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own form)
        tfds.core.BuilderConfig(name=name) for name in ("both", "single")
    ]

    def _info(self):
        text = tfds.features.Text()
        features = {"content": text, "domain": text, "label": np.int64}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        splits = {"train": self._generate_examples(0, 90)}
        if self.builder_config.name == "both":
            splits["validation"] = self._generate_examples(90, 10)
            splits["test"] = self._generate_examples(100, 10)
        return splits

    def _generate_examples(self, start, count):
        for i in range(count):
            row = {"content": line(start + i), "domain": "ab"[i % 2], "label": i}
            yield i, row


class CorpusProbeNumbers(tfds.core.GeneratorBasedBuilder):
    """No text at all."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"label": np.int64, "weight": np.float32})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"label": 1, "weight": 1.0}


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_named_splits_are_taken(tmp_path, data_dir):
    made = corpus.open_corpus("tfds:corpus_probe/both", tmp_path / "cache")
    assert made.domains == ("a", "b")
    assert [d.text for d in made.train] == [line(i) for i in range(90)]
    assert [d.text for d in made.heldout] == [line(i) for i in range(90, 100)]
    assert [d.domain for d in made.heldout] == [0, 1] * 5
    assert made.manifest["notes"]["feature"] == "content"
    assert (data_dir / "corpus_probe" / "both" / "1.0.0").is_dir()
    again = corpus.open_corpus("tfds:corpus_probe/both", tmp_path / "cache")
    assert again.manifest == made.manifest


def test_without_a_held_out_split_clusters_are_held_out(tmp_path):
    made = corpus.open_corpus("tfds:corpus_probe/single", tmp_path / "cache")
    both = [d.text for d in made.train] + [d.text for d in made.heldout]
    assert sorted(both) == sorted(line(i) for i in range(90))
    assert 2 <= len(made.heldout) <= 8


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tfds:corpus_probe_numbers", "no text feature among label, weight"),
        ("tfds:no_such_dataset_at_all", "no such dataset"),
        ("tfds:corpus_probe/nonsense", "nonsense"),
        ("tfds:", "does not have the form tfds:NAME"),
    ],
)
def test_errors_are_one_line_and_name_the_dataset(tmp_path, source, words):
    with pytest.raises(ValueError, match=words) as caught:
        corpus.open_corpus(source, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)


def test_download_that_cannot_be_had_is_refused_at_once(tmp_path, monkeypatch):
    def nowhere(*args):
        raise OSError("no such host")

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    with pytest.raises(ValueError, match=r"lm1b.*download from www.statmt.org cannot be reached"):
        corpus.open_corpus("tfds:lm1b", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
