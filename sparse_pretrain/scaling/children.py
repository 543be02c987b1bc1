"""What a sweep file asks for: its children, each with an id that follows from its content."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEED = "seed"  # the one override that makes pairs instead of arms


@dataclasses.dataclass(frozen=True)
class Child:
    """One run of a sweep; `id` follows from the experiment's code and the overrides alone."""

    id: str
    experiment: str
    config: str
    overrides: dict[str, Any]
    workdir: Path
    log: Path
    arm: str  # the setting without its seed, and without what the whole sweep shares

    def arguments(self) -> list[str]:
        """What `sparse-pretrain train` gets."""
        flags = [f"--config.{key}={_flag(value)}" for key, value in self.overrides.items()]
        return [f"--config={self.config}", *flags, f"--workdir={self.workdir}"]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What children of one arm have in common."""
        rest = sorted((k, repr(v)) for k, v in self.overrides.items() if k != SEED)
        return (self.config, *rest)

    @property
    def label(self) -> str:
        """The arm and the seed, for people."""
        seed = f" seed={self.overrides[SEED]}" if SEED in self.overrides else ""
        return self.arm + seed


def _flag(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(tuple(value)) if isinstance(value, (list, tuple)) else str(value)


def _stem(experiment: str) -> str:
    path, _, arg = _split(experiment)
    return Path(path).stem + (f":{arg}" if arg else "")


def _split(experiment: str) -> tuple[str, str, str]:
    """'dir/file.py:arg' -> ('dir/file.py', ':', 'arg'); a drive letter is no separator."""
    path, colon, arg = experiment.partition(".py:")
    return (path + ".py", ":", arg) if colon else (experiment, "", "")


def load(file: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """The (experiment, overrides) pairs that a sweep file's `get_sweep()` returns.

    Errors: ValueError naming the file, and the entry that is not such a pair.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"sweep: no file {file}")
    module_spec = importlib.util.spec_from_file_location("sparse_pretrain_sweep", file)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"sweep: {file} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_sweep", None)):
            raise ValueError("it defines no get_sweep()")
        pairs = list(module.get_sweep())
    except Exception as e:
        raise ValueError(f"sweep: {file}: {type(e).__name__}: {e}") from e
    if not pairs:
        raise ValueError(f"sweep: {file}: get_sweep() is empty")
    for i, pair in enumerate(pairs):
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not (good and isinstance(pair[0], str) and isinstance(pair[1], Mapping)):
            raise ValueError(
                f"sweep: {file}: entry {i} is not (experiment, {{key: value}}): {pair!r}"
            )
    return [(experiment, dict(overrides)) for experiment, overrides in pairs]


def _locate(experiment: str, file: Path) -> tuple[Path, str]:
    """(the experiment's file, its argument).

    Looked for from here, beside the sweep file and in any folder above it, then as `--config` does,
    among the experiments that ship.
    """
    name, _, arg = _split(experiment)
    for base in (Path.cwd(), *file.resolve().parents):
        if (base / name).is_file():
            return (base / name).resolve(), arg
    from sparse_pretrain import config  # jax with it, which a sweep's own process can do without

    try:
        path, arg = config.locate(experiment)
    except ValueError as e:
        reason = str(e).removeprefix("--config: ")
        raise ValueError(f"sweep: {file}: {reason}") from None
    return path.resolve(), arg


def _code(path: Path) -> str:
    """An experiment's code without comments and docstring, which record results and so change."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as e:
        raise ValueError(f"sweep: {path}: {e}") from None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return ast.unparse(tree)


def children(file: Path | str, root: Path | str) -> list[Child]:
    """The children of a sweep file under `root`, in the file's order, equal ones once.

    Errors: ValueError as `load`, and for an experiment that does not exist.
    """
    file, root = Path(file), Path(root)
    pairs = load(file)
    # Values can be lists, so they are told apart by their text.
    values = {k: {repr(o.get(k, "")) for _, o in pairs} for _, o in pairs for k in o}
    found: dict[str, Child] = {}
    for experiment, overrides in pairs:
        path, arg = _locate(experiment, file)
        content = [path.name, arg, _code(path), sorted(overrides.items())]
        id = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:10]
        name = f"{path.stem}-{id}"
        own = [(k, v) for k, v in overrides.items() if k != SEED and len(values[k]) > 1]
        child = Child(
            id=id,
            experiment=experiment,
            config=f"{path}:{arg}" if arg else str(path),
            overrides=overrides,
            workdir=root / name,
            log=root / "logs" / f"{name}.txt",
            arm=" ".join([_stem(experiment), *(f"{k}={_flag(v)}" for k, v in own)]),
        )
        found.setdefault(id, child)
    return list(found.values())
