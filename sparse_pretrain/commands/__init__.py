"""The commands of the console script: `add(parser)`, `run(args)` and EXAMPLES in each."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any


def status(text: str) -> contextlib.AbstractContextManager[None]:
    """A spinner on standard error while something slow happens; nothing where nobody looks."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from sparse_pretrain.training import progress

    return progress.status(text)


def with_total(parts: Mapping[str, Any], whole: Any) -> list[tuple[str, Any]]:
    """The rows of a table: the parts where there are several, then all together.

    The total goes by a name that no part has.
    """
    rows = [(name or "(no name)", row) for name, row in parts.items()] if len(parts) > 1 else []
    total = "all"
    while total in dict(rows):
        total = f"({total})"
    return [*rows, (total, whole)]
