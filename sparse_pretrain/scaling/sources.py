"""What a sweep has to run, as far as it is known."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling.children import Child, Maker, listed, load
from sparse_pretrain.scaling.combinators import Search


@runtime_checkable
class Source(Protocol):
    """Children, known from the start or decided one by one from what earlier ones reached."""

    @property
    def children(self) -> Sequence[Child]:
        """Those known by now, in order."""

    @property
    def closed(self) -> Collection[str]:
        """The ids of those that were decided before this process, and are not handed out again."""

    @property
    def total(self) -> int:
        """How many there will be."""

    def next(self) -> Child | None:
        """The next to run; None when there is none yet, or no more."""

    def ended(self, child: Child, status: str, run: workdir.Run) -> None:
        """A child is finished, pruned, or has failed in a way that no other attempt changes."""

    def prune(self, child: Child) -> bool:
        """Whether a running child should end here, from its evaluations so far."""

    def summary(self) -> dict[str, Any]:
        """What sweep.json says of it; empty for a plain list."""


class Fixed:
    """A list of children, in its order."""

    def __init__(self, todo: Sequence[Child]):
        self.children = list(todo)
        self.closed: frozenset[str] = frozenset()
        self._place = 0

    @property
    def total(self) -> int:
        """All of them."""
        return len(self.children)

    def next(self) -> Child | None:
        """One after the other."""
        if self._place == len(self.children):
            return None
        self._place += 1
        return self.children[self._place - 1]

    def ended(self, child: Child, status: str, run: workdir.Run) -> None:
        """Nothing follows from it."""

    def prune(self, child: Child) -> bool:
        """Never."""
        return False

    def summary(self) -> dict[str, Any]:
        """Nothing beyond its children."""
        return {}


def sources(file: Path | str, root: Path | str) -> list[Source]:
    """The children of a sweep file: those it lists, then a source for each of its searches.

    Errors: ValueError as `children.load`, and for an experiment that does not exist.
    """
    entries, maker = load(file), Maker(file, root)
    pairs = [e for e in entries if not isinstance(e, Search)]
    found: list[Source] = [Fixed(listed(pairs, maker))] if pairs else []
    searches = [e for e in entries if isinstance(e, Search)]
    if searches:
        from sparse_pretrain.scaling.search import Study

        found += [Study(search, maker) for search in searches]
    return found
