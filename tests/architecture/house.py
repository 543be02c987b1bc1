"""The rules of the house, each a function from a source tree to the lines that break it.

They read the syntax tree and never import what they check, so they run on any folder laid out
like the repository: the tests give them the repository, and small trees that break one rule each.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = ("kernels_pallas", "sparse_pretrain", "experiments")
PACKAGES = ("kernels_pallas", "sparse_pretrain")

# A module imports its own floor or lower. The longest name that fits a module decides.
FLOORS = {
    "kernels_pallas": 0,
    "sparse_pretrain.spec": 1,
    "sparse_pretrain.sections": 1,
    "sparse_pretrain.shapes": 1,
    "sparse_pretrain.nn": 1,
    "sparse_pretrain.games": 1,
    "sparse_pretrain.sharding": 1,
    "sparse_pretrain.attention": 2,
    "sparse_pretrain.routing": 2,
    "sparse_pretrain.model.layers": 2,
    "sparse_pretrain.model.residual": 2,
    "sparse_pretrain.model.engram": 2,
    "sparse_pretrain.model.precision": 2,
    "sparse_pretrain.model": 3,
    "sparse_pretrain.data": 4,
    "sparse_pretrain.optim": 4,
    "sparse_pretrain.checkpoint": 4,
    "sparse_pretrain.phases": 5,
    "sparse_pretrain.config": 5,
    "sparse_pretrain.planning": 5,
    "sparse_pretrain.planning.compile": 6,  # compiles the step of training
    "sparse_pretrain.scaling.fit": 5,
    "sparse_pretrain.scaling.forecast": 5,
    "sparse_pretrain.scaling.published": 5,
    "sparse_pretrain.training": 6,
    "sparse_pretrain.interop": 6,
    "sparse_pretrain.report": 7,
    "sparse_pretrain.scaling": 7,
    "sparse_pretrain.claims": 7,
    "sparse_pretrain.commands": 8,
    "sparse_pretrain.cli": 8,
    "sparse_pretrain.__main__": 8,
    "experiments": 8,
}
STRANGERS = ("sparse_pretrain.data", "sparse_pretrain.optim", "sparse_pretrain.checkpoint")

# Where a library may be imported: modules, or packages with all they hold. Empty is nowhere.
HOMES = {
    "flax": ("sparse_pretrain.nn",),
    "jax.experimental.pallas": ("kernels_pallas",),
    "jax.experimental.mosaic": ("kernels_pallas",),
    "ml_collections": (
        "sparse_pretrain.cli",
        "sparse_pretrain.config",
        "sparse_pretrain.sections",
        "sparse_pretrain.commands",
        "experiments",
    ),
    "tensorflow_datasets": ("sparse_pretrain.data",),
    "grain": ("sparse_pretrain.data",),
    "orbax": ("sparse_pretrain.checkpoint",),
    # claims.gpt2 is the other side of a comparison and shares nothing with our optimizers
    "optax": (
        "sparse_pretrain.optim", "sparse_pretrain.training", "sparse_pretrain.claims.gpt2",
        "experiments",
    ),
    "torch": ("experiments.benchmarks",),
    "transformers": ("experiments.benchmarks",),
    "tensorflow": (),
}

# Modules beside the variants that are not variants themselves.
SHARED = {
    "attention": {
        "base", "blocks", "compressor", "grouped", "indexed", "phi", "queries", "selection",
    },
    "routing": {"base", "copies", "dispatch", "experts", "moe", "expert_parallel"},
}
MAY_BUILD_ON = {("attention.dsa", "attention.mla"), ("attention.csa", "attention.hca")}

# What reads or sets where arrays live; an axis name (jax.lax.axis_index, psum) is no such thing.
PLACES = {
    "AbstractMesh",
    "Mesh",
    "NamedSharding",
    "addressable_shards",
    "default_backend",
    "device",
    "device_count",
    "device_put",
    "devices",
    "get_abstract_mesh",
    "get_concrete_mesh",
    "get_mesh",
    "local_device_count",
    "local_devices",
    "make_mesh",
    "process_count",
    "process_index",
    "set_mesh",
    "sharding",
    "use_mesh",
}
PLACELESS = ("sparse_pretrain.model", "sparse_pretrain.attention", "sparse_pretrain.routing")

LINES, KERNEL_LINES = 400, 600
LABELS = ("Shapes", "Units", "Errors", "Source", "Differs")
# Written so that this file does not hold what it looks for.
HOSTS = r"py[p]i\.org|python[h]osted|registry\.[n]pmjs|deb\.[d]ebian|conda\.[a]naconda"
PATHS = r"/[w]ork/|/[r]oot/|/[h]ome/\w|/[U]sers/\w|/[f]arm/|bash_[j]obs|\.[p]yenv/versions"


class Module(NamedTuple):
    """A source file. `name` is dotted; a package has the name of its folder."""

    name: str
    path: Path
    tree: ast.Module
    lines: int


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return name == package or name.startswith(package + ".")


@functools.cache
def modules(root: Path) -> tuple[Module, ...]:
    """Every Python source file, by name."""
    found = []
    for top in SOURCES:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            found.append(Module(name, path, ast.parse(text), len(text.splitlines())))
    return tuple(found)


def imports(root: Path, module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all a module imports, inside functions and conditions too.

    `from a import b` is `a.b` when that is a module or `a` is not ours to look into.
    """
    own = {m.name for m in modules(root)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = module.path.name == "__init__.py"
                parts = module.name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.split(".")[0] in SOURCES
                yield node.lineno, full if full in own or not ours else base


def floor(name: str) -> int | None:
    """The floor of a module of ours; None when it has none yet."""
    if name == "sparse_pretrain":
        return 0  # the package itself: a version and nothing else
    fits = [prefix for prefix in FLOORS if within(name, prefix)]
    return FLOORS[max(fits, key=len)] if fits else None


def _where(module: Module, line: int) -> str:
    return f"{module.name}:{line}"


def whole(root: Path) -> Iterator[str]:
    """Every folder of the packages is a package: setuptools leaves others out of the wheel."""
    for folder in sorted({m.path.parent for m in modules(root)}):
        inside = folder.relative_to(root)
        if inside.parts[0] in PACKAGES and not (folder / "__init__.py").exists():
            yield f"{inside}: has no __init__.py and would be missing after installation"


def floors(root: Path) -> Iterator[str]:
    """A module imports its own floor or lower."""
    for module in modules(root):
        mine = floor(module.name)
        if mine is None:
            yield f"{module.name}: has no floor; give it one in tests/architecture/house.py"
            continue
        for line, name in imports(root, module):
            theirs = floor(name) if name.split(".")[0] in SOURCES else None
            if theirs is not None and theirs > mine:
                yield f"{_where(module, line)}: floor {mine} imports {name} on floor {theirs}"


def strangers(root: Path) -> Iterator[str]:
    """Data, optimizers and checkpoints do not know one another."""
    for module in modules(root):
        mine = [s for s in STRANGERS if within(module.name, s)]
        for line, name in imports(root, module) if mine else ():
            if any(within(name, s) for s in STRANGERS if s not in mine):
                yield f"{_where(module, line)}: {mine[0]} and {name} are strangers"


def kernels_alone(root: Path) -> Iterator[str]:
    """Kernels import jax and numpy only; those of others are behind a signature of ours."""
    known = {"jax", "numpy", "kernels_pallas", "__future__", *sys.stdlib_module_names}
    for module in modules(root):
        peer = module.name.split(".")[-1] in ("others", "peers")
        allowed = known | {"tokamax"} if peer else known
        for line, name in imports(root, module) if within(module.name, "kernels_pallas") else ():
            if name.split(".")[0] not in allowed:
                yield f"{_where(module, line)}: kernels import jax and numpy only, not {name}"


def experiments_apart(root: Path) -> Iterator[str]:
    """Experiments are loaded by path: nothing in the packages imports them."""
    for module in modules(root):
        for line, name in imports(root, module) if module.name.split(".")[0] in PACKAGES else ():
            if within(name, "experiments"):
                yield f"{_where(module, line)}: imports {name}; experiments are loaded by path"


def homes(root: Path) -> Iterator[str]:
    """A library with a home is imported there only."""
    for module in modules(root):
        for line, name in imports(root, module):
            for library, allowed in HOMES.items():
                if within(name, library) and not any(within(module.name, a) for a in allowed):
                    place = " or ".join(allowed) or "nowhere"
                    yield f"{_where(module, line)}: imports {name}; {library} belongs in {place}"


def variants_apart(root: Path) -> Iterator[str]:
    """An attention variant or a router imports no other and no table, and has a row in its own."""
    own = {m.name for m in modules(root)}
    for module in modules(root):
        parts = module.name.split(".")
        if len(parts) < 3 or parts[0] != "sparse_pretrain" or parts[1] not in SHARED:
            continue
        family, variant = parts[1], parts[2]
        package = f"sparse_pretrain.{family}"
        if variant in SHARED[family]:
            continue
        for line, name in imports(root, module):
            if name == package:
                yield f"{_where(module, line)}: a variant does not read the table of variants"
            other = name.split(".")[2] if name.startswith(package + ".") else variant
            if other == variant or other in SHARED[family] or f"{package}.{other}" not in own:
                continue
            if (f"{family}.{variant}", f"{family}.{other}") not in MAY_BUILD_ON:
                yield f"{_where(module, line)}: {family} variant imports variant {other}"
        table = next((m for m in modules(root) if m.name == package), None)
        if table and not any(within(n, f"{package}.{variant}") for _, n in imports(root, table)):
            yield f"{module.name}: has no row in the table of {package}"


def placeless(root: Path) -> Iterator[str]:
    """Model code reads no mesh and no device."""
    for module in modules(root):
        if not any(within(module.name, p) for p in PLACELESS):
            continue
        for line, name in imports(root, module):
            last = name.rsplit(".", 1)[-1]
            ours = within(name, "sparse_pretrain.sharding") and last != "ops"
            if within(name, "jax.sharding") or ours or (within(name, "jax") and last in PLACES):
                yield f"{_where(module, line)}: imports {name}, which knows meshes or devices"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr in PLACES:
                yield f"{_where(module, node.lineno)}: reads .{node.attr}: a mesh or a device"


def lengths(root: Path) -> Iterator[str]:
    """A file has at most 400 lines, a kernel body 600."""
    for path in files(root):
        if path.suffix != ".py":
            continue
        parts = path.relative_to(root).parts
        kernel = parts[0] == "kernels_pallas" and len(parts) > 2 and path.name != "__init__.py"
        limit = KERNEL_LINES if kernel else LINES
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > limit:
            yield f"{'/'.join(parts)}: {count} lines, more than {limit}: it holds two ideas"


def docstrings(root: Path) -> Iterator[str]:
    """Every module, public class, function and method says what it is, in the house's order.

    A method that overrides a documented one need not repeat it.
    """
    classes: dict[str, list[ast.ClassDef]] = {}
    for module in modules(root):
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
    for module in modules(root):
        if module.name.split(".")[0] not in PACKAGES:
            continue
        for line, name, node, owner in _public(module):
            text = ast.get_docstring(node)
            if not text and not (owner and _inherited(owner, node.name, classes)):
                yield f"{_where(module, line)}: {name} has no docstring"
            labels = re.findall(rf"^\s*({'|'.join(LABELS)}): ", text or "", re.MULTILINE)
            if labels != sorted(labels, key=LABELS.index):
                yield f"{_where(module, line)}: {name} has its parts in the order {labels}"


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _public(module: Module) -> Iterator[tuple[int, str, Any, ast.ClassDef | None]]:
    """(line, name, node, class of a method) of all that has to be documented."""
    yield 1, "the module", module.tree, None
    for node in module.tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.lineno, node.name, node, None
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, FUNCTIONS) and not member.name.startswith("_"):
                    yield member.lineno, f"{node.name}.{member.name}", member, node


def _inherited(owner: ast.ClassDef, method: str, classes: dict[str, list[ast.ClassDef]]) -> bool:
    for base in owner.bases:
        name = ast.unparse(base).split("[")[0].rsplit(".", 1)[-1]
        for parent in classes.get(name, ()):
            stated = [m for m in parent.body if isinstance(m, FUNCTIONS) and m.name == method]
            if any(ast.get_docstring(m) for m in stated):
                return True
            if parent is not owner and _inherited(parent, method, classes):
                return True
    return False


def no_machine(root: Path) -> Iterator[str]:
    """Nothing names a package registry's host or a path of one machine."""
    looked_for = re.compile(f"{HOSTS}|{PATHS}")
    for path in files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # arrays and the like
        for number, line in enumerate(text.splitlines(), 1):
            found = looked_for.search(line)
            if found:
                yield f"{path.relative_to(root)}:{number}: names {found[0]}"


@functools.cache
def files(root: Path) -> tuple[Path, ...]:
    """What the repository holds: what git would commit, or every file where there is no git."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        found = [root / name for name in listed.decode().split("\0") if name]
    else:
        skipped = {".venv", "__pycache__", "build", "dist", "runs"}
        found = [
            p for p in root.rglob("*") if not skipped.intersection(p.relative_to(root).parts)
        ]
    return tuple(sorted({p for p in found if p.is_file()}))


RULES: dict[str, Callable[[Path], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        whole,
        floors,
        strangers,
        kernels_alone,
        experiments_apart,
        homes,
        variants_apart,
        placeless,
        lengths,
        docstrings,
        no_machine,
    )
}
