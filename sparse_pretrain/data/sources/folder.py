"""Text files below a folder, with domains by sub-folder."""

from __future__ import annotations

import gzip
import json
import re
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

from sparse_pretrain.data.sources import base

KINDS = (".txt", ".md", ".py", ".jsonl")
SUFFIXES = KINDS + tuple(kind + ".gz" for kind in KINDS)
ROOT = "root"  # domain of the files that lie in no sub-folder

_END = r"([-_.].*)?$"
_TRAIN = re.compile("^(train|training)" + _END, re.I)
_VALID = re.compile("^(val|valid|validation|dev|heldout|held[-_]out|eval)" + _END, re.I)
_TEST = re.compile("^test" + _END, re.I)


class Folder(base.Source):
    """The txt, md, py and jsonl files below a folder, each also as .gz.

    A file is a document; in jsonl every line is one, an object whose `text` is a string. The first
    sub-folder names the domain. Files or top folders called train and val (valid, validation, dev,
    heldout, eval; or test where none of these is there) are taken as the two splits, unchanged.
    Otherwise near-duplicate clusters are held out, and where a domain's documents are too large for
    that, the last tenth of the characters of each. So a folder of one file is split as nanoGPT
    does it: `text[:int(0.9 * len(text))]` is train, all that follows is held out.

    Errors: ValueError, naming data.source and the folder or the file (and line): missing or empty
    folder, file that cannot be read or decoded as UTF-8, malformed line of jsonl.
    """

    def __init__(self, spec: str) -> None:
        self.root = Path(spec.partition(":")[2]).expanduser().resolve()
        super().__init__(spec, "text_folder")
        if not self.root.exists():
            raise self.fail(f"no folder {self.root}")
        if not self.root.is_dir():
            raise self.fail(f"{self.root} is a file, not a folder")

    def _files(self) -> list[tuple[str, Path]]:
        try:
            found = [Path(e.path) for e in base.walk(self.root, SUFFIXES, frozenset())]
        except OSError as error:
            raise self.fail(f"cannot list {error.filename}: {error.strerror}") from None
        if not found:
            raise self.fail(f"no {', '.join(KINDS)} (or .gz of these) file in it")
        return [(path.relative_to(self.root).as_posix(), path) for path in found]

    def fingerprint(self) -> str:
        stats = []
        for name, path in self._files():
            stat = path.stat()
            stats.append((name, stat.st_size, stat.st_mtime_ns))
        return base.digest([str(self.root), stats])

    def read(self) -> Iterator[base.Raw]:
        files = self._files()
        splits = _splits([name for name, _ in files])
        text = False
        for name, path in files:
            split, parts = "", name.split("/")
            if splits:
                split = splits.get(parts[0], "train")
                parts = parts[1:] if len(parts) > 1 and parts[0] in splits else parts
            if split == "unused":
                continue
            domain = parts[0] if len(parts) > 1 else ROOT
            for document, content in self._documents(path, name):
                text = text or bool(content.strip())
                yield base.Raw(content, domain, document, split)
        if not text:
            raise self.fail(f"its {len(files)} files hold no text")
        if splits:
            self.notes["splits"] = splits

    def _documents(self, path: Path, name: str) -> Iterator[tuple[str, str]]:
        try:
            yield from _documents(path, name)
        except ValueError as error:
            raise self.fail(error) from None


def _splits(names: list[str]) -> dict[str, str]:
    """Top-level file or folder -> split, where both a train and a held-out one are named."""
    tops = sorted({name.split("/")[0] for name in names})
    train = [top for top in tops if _TRAIN.match(top)]
    valid = [top for top in tops if _VALID.match(top)]
    test = [top for top in tops if _TEST.match(top)]
    if not train or not (valid or test):
        return {}
    result = dict.fromkeys(train, "train") | dict.fromkeys(valid or test, "heldout")
    # A test split beside a validation split is for nobody's eyes yet.
    return result | (dict.fromkeys(test, "unused") if valid else {})


def _documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(Name, text) of each document in a file."""
    kind = Path(name.removesuffix(".gz")).suffix
    try:
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
            if kind == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name}:{number}", _record(line, f"{path}:{number}")
                return
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        declared = _declared(data) if kind == ".py" else None
        if declared is None:
            raise ValueError(
                f"cannot decode {path}: not UTF-8 at byte {error.start} ({error.reason})"
            ) from None
        text = declared
    yield name, text.replace("\r\n", "\n").replace("\r", "\n")


def _declared(data: bytes) -> str | None:
    """The text of a Python file in the encoding that its first lines declare."""
    lines = iter(data.splitlines(keepends=True))
    try:
        return data.decode(tokenize.detect_encoding(lambda: next(lines, b""))[0])
    except (SyntaxError, LookupError, UnicodeDecodeError):
        return None


def _record(line: bytes, where: str) -> str:
    """The text of one line of jsonl."""
    try:
        record = json.loads(line)
    except ValueError as error:  # a decoding error is one too
        raise ValueError(f"{where}: not a JSON object ({error})") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no string field 'text' (found: {keys})")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: 'text' has half of a surrogate pair") from None
    return text
