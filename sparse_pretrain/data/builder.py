"""TFDS builders over the text of this machine, written as ArrayRecord without TensorFlow.

`tfds.builder("python_stdlib", data_dir=..., file_format="array_record")` works once this module is
imported; `corpus.open_corpus` adds the cache, the manifest and the checks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from sparse_pretrain.data import heldout
from sparse_pretrain.data.sources import base, folder, packages, stdlib

PIECE = 1 << 20  # characters of a record at most; a longer document becomes several


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Documents with text, domain and name, in the splits train and heldout, in a fixed order.

    `split` is the split made already; without it the builder reads its source.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, split: heldout.Split | None = None, **kwargs: Any) -> None:
        self._split = split
        super().__init__(**kwargs)

    def _source(self) -> base.Source:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").split("\n")[0],
            features=tfds.features.FeaturesDict({"text": text, "domain": text, "name": text}),
            disable_shuffling=True,  # the order is the corpus's, and part of its hash
        )

    def download_and_prepare(self, **kwargs: Any) -> None:
        """Write the records, as TFDS does; frees a split that was made for it."""
        given = self._split
        try:
            super().download_and_prepare(**kwargs)
        finally:
            if self._split is not None and self._split is not given:
                self._split.close()
                self._split = None

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[Any]]:
        del dl_manager  # nothing is downloaded
        if self._split is None:
            source = self._source()
            self._split = heldout.Split(
                source.read(), Path(tempfile.gettempdir()), fold=source.fold
            )
        return {
            "train": self._generate_examples(self._split.train()),
            "heldout": self._generate_examples(iter(self._split.heldout)),
        }

    def _generate_examples(self, documents: Iterator[tuple[str, str, str]]) -> Iterator[Any]:
        for i, (domain, name, text) in enumerate(pieces(documents)):
            yield i, {"text": text, "domain": domain, "name": name}


class PythonStdlib(TextBuilder):
    """The text of the running interpreter's own library, tests left out."""

    def _source(self) -> base.Source:
        return stdlib.Stdlib()


class PythonPackages(TextBuilder):
    """The standard library and the text of the installed packages, tests left out."""

    def _source(self) -> base.Source:
        return packages.Packages()


class TextFolder(TextBuilder):
    """The text files below a folder."""

    def __init__(self, *, path: str = ".", **kwargs: Any) -> None:
        self._path = path
        super().__init__(**kwargs)

    def _source(self) -> base.Source:
        return folder.Folder(f"text_folder:{self._path}")


class TfdsText(TextBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The text of another TFDS dataset."""


BUILDERS: dict[str, type[TextBuilder]] = {
    "python_stdlib": PythonStdlib,
    "python_packages": PythonPackages,
    "text_folder": TextFolder,
    "tfds": TfdsText,
}


def pieces(documents: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Documents with those above PIECE characters cut, at a line's end where there is one."""
    for domain, name, text in documents:
        start = number = 0
        while start < len(text):
            stop = len(text)
            if stop - start > PIECE:
                stop = start + PIECE
                stop = text.rfind("\n", start, stop) + 1 or stop
            number += 1
            yield domain, name if number == 1 else f"{name} ({number})", text[start:stop]
            start = stop
