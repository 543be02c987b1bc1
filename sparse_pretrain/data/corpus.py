"""A corpus: text with named domains, a held-out split and a manifest, cached as ArrayRecord."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import operator
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

from sparse_pretrain.data import files, sources

# What a corpus is made by, beside its source: a change here rebuilds it.
_CODE = ("builder.py", "corpus.py", "dedup.py", "heldout.py", "spool.py", "sources/*.py")
MANIFEST = "manifest.json"  # written last: a folder without it is no corpus
_BUILDING = ".building-"
_STALE = 86_400  # seconds after which another process's unfinished build is taken for dead


class Document(NamedTuple):
    """One document: its text, the index of its domain in `Corpus.domains`, and its name."""

    text: str
    domain: int
    name: str


class Documents(Sequence[Document]):
    """The documents of one split, read from ArrayRecord when asked for, in a fixed order.

    Pickles as a path, so that worker processes open their own files.
    """

    def __init__(self, folder: Path, split: str, domains: tuple[str, ...], length: int) -> None:
        self._folder, self._split, self._length = folder, split, length
        self._domains = {name: i for i, name in enumerate(domains)}
        self._rows: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: SupportsIndex) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        at = operator.index(index)
        if not -self._length <= at < self._length:
            raise IndexError(f"document {at} of {self._length}")
        if self._rows is None:
            import tensorflow_datasets as tfds  # a third of a second that `--help` must not pay

            self._rows = tfds.builder_from_directory(self._folder).as_data_source(self._split)
        row = self._rows[at % self._length]
        domain, name = row["domain"].decode(), row["name"].decode()
        return Document(row["text"].decode(), self._domains[domain], name)


class Corpus(NamedTuple):
    """Train and held-out documents in a fixed order, random access, with the manifest of both.

    The manifest has at least `hash` (of domain, name, split and text of every document), `source`,
    `python`, `domains: {name: {documents, train_bytes, heldout_bytes}}` and `overlap_50` (share of
    held-out characters inside a 50-character string that train has too). Results compare only
    within one hash.
    """

    name: str
    domains: tuple[str, ...]
    manifest: dict[str, Any]
    train: Sequence[Document]
    heldout: Sequence[Document]


def open_corpus(source: str, cache: Path) -> Corpus:
    """The corpus that `source` names: built under `cache` the first time, read from there after.

    `source` is python_stdlib, python_packages, text_folder:PATH or tfds:NAME[/CONFIG]. A build
    works in a folder of its own that is renamed when complete, so that a build cut short is never
    read, and two at a time do no harm.

    Errors: ValueError where the source is unknown or cannot be read (see `data/sources`); OSError
        where the cache cannot be written.
    """
    origin = sources.parse(source)
    key = sources.digest([_code(), source, origin.fingerprint()])
    home = Path(cache).expanduser() / "corpora"
    folder = home / f"{origin.name}-{key}"
    manifest = _complete(folder)
    if manifest is None:
        _build(origin, home, folder)
        manifest = _complete(folder)
        if manifest is None:
            raise OSError(f"corpus cache {folder} is not as it was written a moment ago")
    domains = tuple(manifest["domains"])
    data = folder / manifest["folder"]
    train, heldout = (
        Documents(data, split, domains, manifest[f"{split}_documents"])
        for split in ("train", "heldout")
    )
    return Corpus(origin.name, domains, manifest, train, heldout)


def _code() -> list[str]:
    here = Path(__file__).parent
    files = sorted(path for pattern in _CODE for path in here.glob(pattern))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def _complete(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished build whose files have their sizes; None otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, size in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                return None
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return manifest


def _build(origin: sources.Source, home: Path, folder: Path) -> None:
    """Build the corpus of `origin` beside `folder` and rename it there."""
    started = time.monotonic()
    scratch: Path | None = None
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        scratch = files.new_folder(home, _BUILDING)
        with _status(origin.name) as tell:
            manifest = _write(origin, scratch, tell)
            _place(scratch, folder)
            summary = _summary(origin.name, manifest)
            tell(f"{summary}, {time.monotonic() - started:.1f} s", True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"cannot write the corpus cache under {home}: {reason}"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _write(origin: sources.Source, scratch: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything of a corpus, in `scratch`: records first, the manifest last."""
    from sparse_pretrain.data import builder, heldout
    from sparse_pretrain.data.sources import prepared

    name = f"data.source={origin.spec!r}: "
    split = heldout.Split(origin.read(), scratch, source=name, fold=origin.fold, tell=tell)
    try:
        need = 2 * split.bytes  # TFDS sorts through temporary files of the same size
        free = shutil.disk_usage(scratch).free
        if free < need:
            raise OSError(errno.ENOSPC, f"needs {need} bytes, {free} are free")
        tell("writing")
        make = builder.BUILDERS[origin.spec.partition(":")[0]]
        with prepared.quiet_tfds():
            built = make(split=split, data_dir=scratch, file_format="array_record")
            try:
                built.download_and_prepare()
            except RuntimeError as error:  # how ArrayRecord reports that it cannot write
                full = "No space left" in str(error)
                raise OSError(
                    errno.ENOSPC if full else errno.EIO, " ".join(str(error).split())
                ) from error
        data = Path(built.data_dir)
        shutil.rmtree(scratch / "downloads", ignore_errors=True)  # TFDS makes it, empty
        domains, hashed = _count(split.domains, builder.pieces, split)
    finally:
        split.close()
    lengths = {name: int(built.info.splits[name].num_examples) for name in ("train", "heldout")}
    names = tuple(domains)
    tell("checking")
    written = hashlib.sha256()
    for name in ("train", "heldout"):
        for document in Documents(data, name, names, lengths[name]):
            _add(written, names[document.domain], document.name, name, document.text)
    if written.hexdigest() != hashed:
        raise OSError(errno.EIO, "the records read back differ from what was written")
    manifest = {
        "hash": hashed[:16],
        "source": origin.spec,
        "python": platform.python_version(),
        "domains": domains,
        "overlap_50": split.notes["overlap_50"],
        "train_documents": lengths["train"],
        "heldout_documents": lengths["heldout"],
        "train_bytes": sum(d["train_bytes"] for d in domains.values()),
        "heldout_bytes": sum(d["heldout_bytes"] for d in domains.values()),
        "notes": split.notes | origin.notes,
        "folder": data.relative_to(scratch).as_posix(),
        "files": {
            path.relative_to(scratch).as_posix(): path.stat().st_size
            for path in sorted(data.iterdir())
        },
    }
    with open(scratch / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _count(names: Iterable[str], pieces: Callable[..., Any], split: Any) -> tuple[dict, str]:
    """Documents and bytes by domain, and the hash of everything."""
    domains = {name: {"documents": 0, "train_bytes": 0, "heldout_bytes": 0} for name in names}
    hashed = hashlib.sha256()
    for part, documents in (("train", split.train()), ("heldout", split.heldout)):
        for domain, name, text in pieces(documents):
            _add(hashed, domain, name, part, text)
            domains[domain]["documents"] += 1
            domains[domain][f"{part}_bytes"] += len(text.encode())
    return domains, hashed.hexdigest()


def _add(hashed: Any, *fields: str) -> None:
    for field in fields:
        data = field.encode()
        hashed.update(len(data).to_bytes(8, "little"))  # no two lists of fields run together
        hashed.update(data)


def _place(scratch: Path, folder: Path) -> None:
    """Rename a finished build to `folder`; where another process was first, keep its build."""
    for _ in range(3):
        try:
            os.rename(scratch, folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if _complete(folder) is not None:
                return
            # What lies there is broken: out of the way first, by rename, so that no reader sees
            # half of a folder being deleted.
            broken = files.new_folder(folder.parent, _BUILDING)
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, broken / "broken")
            shutil.rmtree(broken, ignore_errors=True)
    raise OSError(errno.EEXIST, f"{folder} keeps reappearing")


def _sweep(home: Path) -> None:
    """Delete the scratch folders of builds that died long ago."""
    for path in home.glob(f"{_BUILDING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                shutil.rmtree(path, ignore_errors=True)


def _summary(name: str, manifest: dict[str, Any]) -> str:
    return (
        f"{name}: {manifest['train_bytes'] / 1e6:.1f} MB train, "
        f"{manifest['heldout_bytes'] / 1e6:.2f} MB held out, {len(manifest['domains'])} domains, "
        f"overlap {100 * manifest['overlap_50']:.1f} %, hash {manifest['hash']}"
    )


@contextlib.contextmanager
def _status(name: str) -> Iterator[Callable[..., None]]:
    """A status line on standard error while a corpus is built, and its last message kept."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"preparing {name}") as status:

        def tell(message: str, last: bool = False) -> None:
            if last:
                console.print(f"prepared {message}")
            else:
                status.update(f"preparing {name}: {message}")

        yield tell
