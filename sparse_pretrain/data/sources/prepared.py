"""Any TFDS dataset with a text feature, prepared already or preparable here."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from sparse_pretrain.data.sources import base

# Names of the text feature, best first; otherwise the only Text feature is taken.
FEATURES = ("text", "content", "article", "document", "sentence", "story", "body")
RESOLVE = 10.0  # seconds that the name of a download's host may take to resolve
HELDOUT = ("validation", "valid", "val", "dev", "heldout", "test")


class Prepared(base.Source):
    """The text feature of a TFDS dataset, in TFDS's own data folder.

    A split called train is train, and validation (or test) is held out; without these, clusters are
    held out of all splits. A string feature `domain` names the domains; otherwise the dataset does.

    Errors: ValueError when no such dataset exists, when it has no text feature, or when it is not
    prepared and cannot be (it needs a download, say).
    """

    def __init__(self, spec: str) -> None:
        super().__init__(spec, "tfds_" + spec.partition(":")[2].replace("/", "_").replace(":", "_"))
        self.dataset = spec.partition(":")[2]
        self._builder: Any = None

    def _fail(self, reason: object) -> ValueError:
        return self.fail(" ".join(str(reason).split())[:300])  # of a library's, which can be pages

    def _open(self) -> Any:
        if self._builder is not None:
            return self._builder
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(
                self.dataset,
                data_dir=os.environ.get("TFDS_DATA_DIR"),  # TFDS itself reads it at import only
                file_format="array_record",
            )
        except tfds.core.DatasetNotFoundError:
            raise self._fail("TFDS knows no such dataset") from None
        except Exception as error:
            raise self._fail(f"{type(error).__name__}: {error}") from None
        self._feature(builder.info.features)  # refuse images before they are downloaded
        if not builder.is_prepared():
            hosts = _unreachable(builder)
            if hosts:
                raise self._fail(
                    f"not prepared in {builder.data_dir}, and its download from "
                    f"{', '.join(hosts)} cannot be reached"
                )
            try:
                with quiet_tfds():
                    builder.download_and_prepare(file_format="array_record")
            except Exception as error:
                # A missing network surfaces as one of many types, by the dataset's own code.
                raise self._fail(
                    f"not prepared in {builder.data_dir}, and preparing it failed: "
                    f"{type(error).__name__}: {error}"
                ) from None
        self._builder = builder
        return builder

    def fingerprint(self) -> str:
        builder = self._open()
        splits = {
            name: (split.num_examples, split.num_bytes, list(split.shard_lengths))
            for name, split in builder.info.splits.items()
        }
        return base.digest([builder.info.full_name, splits])

    def read(self) -> Iterator[base.Raw]:
        builder = self._open()
        feature = self._feature(builder.info.features)
        domains = "domain" in builder.info.features and feature != "domain"
        names = sorted(builder.info.splits)
        heldout = next((name for name in HELDOUT if name in names), None)
        given = heldout is not None and "train" in names
        self.notes = {"dataset": builder.info.full_name, "feature": feature, "given": given}
        for name in ("train", heldout) if given else names:
            try:
                rows = builder.as_data_source(name)
            except Exception as error:
                raise self._fail(f"split {name!r} cannot be read: {error}") from None
            for i in range(len(rows)):
                row = rows[i]
                yield base.Raw(
                    _text(row[feature]),
                    (_text(row["domain"]) if domains else "") or builder.info.name,
                    f"{name}/{i}",
                    ("heldout" if name == heldout else "train") if given else "",
                )

    def _feature(self, features: Any) -> str:
        import tensorflow_datasets as tfds

        texts = [key for key, value in features.items() if isinstance(value, tfds.features.Text)]
        for name in (*FEATURES, *(texts if len(texts) == 1 else ())):
            if name in texts:
                return name
        raise self._fail(
            f"no text feature among {', '.join(sorted(features))}; "
            f"looked for {', '.join(FEATURES)}, or a single one of type Text"
        )


def _unreachable(builder: Any) -> list[str]:
    """The hosts that a dataset is downloaded from, if no name of them resolves within seconds.

    Left to itself the downloader retries for minutes. Behind a proxy, or where some download lies
    there already, only trying can tell.
    """
    downloads = Path(builder.data_dir).parents[len(Path(builder.info.full_name).parts) - 1]
    kept = [path for path in downloads.glob("downloads/**/*") if path.is_file()]
    if any(".tmp." not in path.name for path in kept) or {"http", "https"} & set(getproxies()):
        return []
    try:
        hosts = sorted({urlsplit(url).hostname or "" for url in builder.url_infos} - {""})
    except Exception:  # a dataset need not register its downloads
        return []
    found: list[bool] = []
    threads = [threading.Thread(target=_resolve, args=(h, found), daemon=True) for h in hosts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + RESOLVE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [] if found else hosts


def _resolve(host: str, found: list[bool]) -> None:
    with contextlib.suppress(OSError):
        if socket.getaddrinfo(host, 443):
            found.append(True)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """TFDS without its messages and progress bars."""
    import tensorflow_datasets as tfds

    retries = logging.getLogger("urllib3.connectionpool")
    level = retries.level
    retries.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        retries.setLevel(level)
