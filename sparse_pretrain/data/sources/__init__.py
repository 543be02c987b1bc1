"""Sources of text by name: a new one is a file here and a line in TABLE."""

from __future__ import annotations

from collections.abc import Callable

from sparse_pretrain.data.sources.base import Raw, Source, digest
from sparse_pretrain.data.sources.folder import Folder
from sparse_pretrain.data.sources.packages import Packages
from sparse_pretrain.data.sources.prepared import Prepared
from sparse_pretrain.data.sources.stdlib import Stdlib

SYNTHETIC = "synthetic:TASK"  # made and not read: data/synthetic.py

__all__ = ["TABLE", "Raw", "Source", "digest", "parse"]

# Name -> (form in messages, constructor from the whole source string).
TABLE: dict[str, tuple[str, Callable[[str], Source]]] = {
    "python_stdlib": ("python_stdlib", Stdlib),
    "python_packages": ("python_packages", Packages),
    "text_folder": ("text_folder:PATH", Folder),
    "tfds": ("tfds:NAME[/CONFIG]", Prepared),
}


def parse(spec: str) -> Source:
    """The source that `spec` names.

    Errors: ValueError on an unknown name, an argument too many or one too few.
    """
    name, colon, argument = spec.partition(":")
    if name not in TABLE:
        known = ", ".join([*(form for form, _ in TABLE.values()), SYNTHETIC])
        raise ValueError(f"data.source={spec!r} is unknown; known: {known}")
    form, make = TABLE[name]
    if (":" in form) != bool(colon and argument.strip()):
        raise ValueError(f"data.source={spec!r} does not have the form {form}")
    return make(spec)
