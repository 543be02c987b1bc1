"""The commands of the console script: `add(parser)`, `run(args)` and EXAMPLES in each."""

import contextlib
import sys


def status(text: str) -> contextlib.AbstractContextManager[None]:
    """A spinner on standard error while something slow happens; nothing where nobody looks."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from sparse_pretrain.training import progress

    return progress.status(text)
