"""Where the children of a sweep run: a row per engine."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sparse_pretrain.scaling.children import Child
from sparse_pretrain.scaling.process import Asked, Outcome

Remember = Callable[[str, str], None]


@runtime_checkable
class Engine(Protocol):
    """Runs children. `run` is called from as many threads as there are workers."""

    def run(self, child: Child, asked: Asked) -> Outcome:
        """Bring one child to an end; while `asked()` is not 0, stop it as `process.execute`."""

    def close(self) -> None:
        """Let go of what the engine holds; no child is running."""


TABLE = {
    "local": ("sparse_pretrain.scaling.engines.local", "Local"),
    "ray": ("sparse_pretrain.scaling.engines.on_ray", "OnRay"),
    "slurm": ("sparse_pretrain.scaling.engines.on_slurm", "OnSlurm"),
}


def make(name: str, *, workers: int, root: Path, options: Mapping[str, str], **more: Any) -> Engine:
    """The engine of a name.

    Errors: ValueError naming an engine or an option that there is not, or the extra to install.
    """
    if name not in TABLE:
        raise ValueError(f"--engine: {name!r} is not one of {', '.join(TABLE)}")
    module, kind = TABLE[name]
    return getattr(importlib.import_module(module), kind)(
        workers=workers, root=root, options=options, **more
    )


def unknown_option(name: str, options: Mapping[str, str], known: tuple[str, ...]) -> None:
    """Errors: ValueError naming an option that the engine does not have."""
    for key in options:
        if key not in known:
            there = f"one of {', '.join(known)}" if known else "none; it takes no options"
            raise ValueError(f"--option: {key!r} of the engine {name} is not {there}")


def needs(package: str, extra: str, what: str) -> Any:
    """The imported package of an extra.

    Errors: ValueError in one line where it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ValueError(
            f"{what} needs the package {package!r} ({e}): "
            f"python3 -m pip install 'sparse-pretrain[{extra}]'"
        ) from None
