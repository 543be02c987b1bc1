"""Op and Backend: choose an implementation, explain the choice, refuse with a reason."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

_preferred: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "preferred", default=())


@contextlib.contextmanager
def prefer(*names: str) -> Iterator[None]:
    """Take these backends before others, in this order, in calls that name none.

    An op without such a backend, or whose backend refuses, chooses as ever. JAX knows nothing of
    it: what `jax.jit` has traced before keeps its choices, so trace a function made inside.
    """
    token = _preferred.set(names)
    try:
        yield
    finally:
        _preferred.reset(token)


def _always(*args: Any, **kwargs: Any) -> str | None:
    """Support everything."""
    del args, kwargs
    return None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op, and what it cannot do.

    `supports` gets the arguments `fn` would get and returns None, or the reason why it cannot
    run. It must read shapes, dtypes and the platform only: under `jit` the arrays are tracers.
    """

    name: str
    fn: Callable[..., Any]
    supports: Callable[..., str | None] = _always


@dataclasses.dataclass(frozen=True)
class Op:
    """A named operation with its backends in order of preference, the reference last.

    Errors: a named backend that does not exist or cannot run raises ValueError with the reason
    and never falls back, so a benchmark cannot measure the wrong thing. When none is named, the
    first that can run is taken; those that `prefer` names come before all.
    """

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        names = [backend.name for backend in self.backends]
        assert names, f"{self.name}: an op needs a backend"
        assert len(set(names)) == len(names), f"{self.name}: backend named twice in {names}"
        assert "reference" not in names[:-1], f"{self.name}: the reference comes last in {names}"

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, str | None]:
        """Return, per backend in order of preference, None or the reason why it cannot run."""
        return {b.name: b.supports(*args, **kwargs) for b in self.backends}

    def choose(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Backend:
        """Return the backend that a call with these arguments runs."""
        if implementation is not None:
            backend = self[implementation]
            reason = backend.supports(*args, **kwargs)
            if reason is not None:
                raise ValueError(
                    f"{self.name}: implementation={implementation!r} cannot run: {reason}")
            return backend
        reasons = []
        preferred = _preferred.get()
        first = [b for name in preferred for b in self.backends if b.name == name]
        for backend in (*first, *(b for b in self.backends if b.name not in preferred)):
            reason = backend.supports(*args, **kwargs)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise ValueError(f"{self.name}: no implementation can run ({'; '.join(reasons)})")

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(b.name for b in self.backends)
        raise ValueError(f"{self.name}: implementation={name!r} is unknown; there are {names}")

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        return self.choose(*args, implementation=implementation, **kwargs).fn(*args, **kwargs)
