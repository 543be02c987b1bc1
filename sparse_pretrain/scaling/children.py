"""What a sweep file asks for: its children, each with an id that follows from its content."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.scaling.combinators import Search

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


Pair = tuple[str, dict[str, Any]]


def load(file: Path | str) -> list[Pair | Search]:
    """What a sweep file's `get_sweep()` returns: (experiment, overrides) pairs, and searches.

    Errors: ValueError naming the file, and the entry that is neither.
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
        found = module.get_sweep()
        entries = [found] if isinstance(found, Search) else list(found)
    except Exception as e:
        raise ValueError(f"sweep: {file}: {type(e).__name__}: {e}") from e
    if not entries:
        raise ValueError(f"sweep: {file}: get_sweep() is empty")
    for i, entry in enumerate(entries):
        if isinstance(entry, Search):
            continue
        good = isinstance(entry, (tuple, list)) and len(entry) == 2
        if not (good and isinstance(entry[0], str) and isinstance(entry[1], Mapping)):
            raise ValueError(
                f"sweep: {file}: entry {i} is not (experiment, {{key: value}}): {entry!r}"
            )
    return [e if isinstance(e, Search) else (e[0], dict(e[1])) for e in entries]


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


class Maker:
    """Makes the children of a sweep file, reading each experiment once.

    Errors: ValueError for an experiment that does not exist.
    """

    def __init__(self, file: Path | str, root: Path | str):
        self.file, self.root = Path(file), Path(root).absolute()
        self._known: dict[str, tuple[Path, str, str]] = {}

    def experiment(self, name: str) -> tuple[Path, str, str]:
        """(file, argument, code) of an experiment."""
        if name not in self._known:
            path, arg = _locate(name, self.file)
            self._known[name] = (path, arg, _code(path))
        return self._known[name]

    def child(self, name: str, overrides: Mapping[str, Any], own: Collection[str]) -> Child:
        """One run; its arm is named by the experiment and the keys in `own`."""
        path, arg, code = self.experiment(name)
        content = [path.name, arg, code, sorted(overrides.items())]
        id = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:10]
        folder = f"{path.stem}-{id}"
        shown = [(k, v) for k, v in overrides.items() if k != SEED and k in own]
        return Child(
            id=id,
            experiment=name,
            config=f"{path}:{arg}" if arg else str(path),
            overrides=dict(overrides),
            workdir=self.root / folder,
            log=self.root / "logs" / f"{folder}.txt",
            arm=" ".join([_stem(name), *(f"{k}={_shown(v)}" for k, v in shown)]),
        )


def _shown(value: Any) -> str:
    return _flag(float(f"{value:.6g}") if isinstance(value, float) else value)


def listed(pairs: Sequence[Pair], maker: Maker) -> list[Child]:
    """The children of a list of (experiment, overrides), in its order, equal ones once."""
    # Values can be lists, so they are told apart by their text.
    values: dict[str, set[str]] = {}
    for key in {k for _, overrides in pairs for k in overrides}:
        values[key] = {repr(overrides.get(key, "")) for _, overrides in pairs}
    own = {key for key, different in values.items() if len(different) > 1}
    made = [maker.child(experiment, overrides, own) for experiment, overrides in pairs]
    return list({child.id: child for child in reversed(made)}.values())[::-1]


def children(file: Path | str, root: Path | str) -> list[Child]:
    """The children of a sweep file under `root`, in the file's order, equal ones once.

    Errors: ValueError as `load`, for an experiment that does not exist, and for a search, whose
    children follow from one another.
    """
    pairs = []
    for entry in load(file):
        if isinstance(entry, Search):
            raise ValueError(f"sweep: {file}: a search has no list of children before it runs")
        pairs.append(entry)
    return listed(pairs, Maker(file, root))
