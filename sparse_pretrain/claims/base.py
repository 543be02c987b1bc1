"""A claim: what a paper says, what is tested here, and the rule, fixed beforehand, that decides.

A claim is a file of `experiments/claims`. Its docstring is the record: a line `ID: title.`, then
the parts Source, Published, Kind, Tested, Criterion, Cost and, once there is one, Result. Its
function `measure(bench)` returns an Outcome, or raises NotRun where something it needs is absent.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_pretrain import config, sections

PASS, FAIL, REPORTED, NOT_RUN = "PASS", "FAIL", "REPORTED", "NOT RUN"
VERDICTS = (PASS, FAIL, REPORTED, NOT_RUN)
KINDS = ("EXACT", "REFIT", "DIRECTION")
PARTS = ("Source", "Published", "Kind", "Tested", "Criterion", "Cost", "Result")


class NotRun(Exception):
    """Why a claim cannot be run here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a claim's experiment found; `passed` is None where its criterion has no rule.

    `measured` is one line for the ledger. `interval` is (value, low, high) at 95 % where there is
    chance in it, of what `of` names. `numbers` is all that the report shows, plain data.
    `analysis` says why it failed, or what a pass does not show.
    """

    passed: bool | None
    measured: str
    interval: tuple[float, float, float] | None = None
    of: str = ""
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    analysis: str = ""


def verdict(passed: bool | None) -> str:
    """What an outcome is called."""
    return REPORTED if passed is None else PASS if passed else FAIL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One file of experiments/claims; `code` is a digest of it without comments and docstrings."""

    id: str
    name: str
    title: str
    source: str
    published: str
    kind: str
    tested: str
    criterion: str
    cost: str
    result: str
    path: Path
    code: str
    measure: Callable[[Any], Outcome]

    @property
    def section(self) -> str:
        """A, B or C."""
        return self.id[0]

    @property
    def command(self) -> str:
        """What runs it again."""
        return f"sparse-pretrain reproduce {self.name}"


def parse(path: Path) -> Claim:
    """The claim of a file.

    Errors: ValueError naming the file and the part that it lacks.
    """
    source = importlib.util.spec_from_file_location(f"_claim_{path.stem}", path)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module
    source.loader.exec_module(module)
    text = module.__doc__ or ""
    head = re.match(r"([ABC]\d+): (.+)", text)
    if head is None:
        raise ValueError(f"{path}: its docstring does not begin with 'ID: title'")
    parts = _parts(text)
    missing = [part for part in PARTS[:-1] if part not in parts]
    if missing or not callable(getattr(module, "measure", None)):
        raise ValueError(f"{path}: has no {missing[0] if missing else 'function measure(bench)'}")
    kind = parts["Kind"].rstrip(".")
    if kind not in KINDS:
        raise ValueError(f"{path}: Kind {kind!r} is not one of {', '.join(KINDS)}")
    fields = {part.lower(): parts.get(part, "") for part in PARTS}
    return Claim(
        **fields | {"kind": kind},
        id=head[1],
        name=path.stem,
        title=head[2].rstrip("."),
        path=path,
        code=_code(path),
        measure=module.measure,
    )


def _parts(text: str) -> dict[str, str]:
    """Each labelled part of a docstring in one line; a part ends where the next label begins."""
    cut = re.split(rf"^({'|'.join(PARTS)}):", text, flags=re.MULTILINE)
    return {label: " ".join(body.split()) for label, body in zip(cut[1::2], cut[2::2], strict=True)}


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def folder() -> Path:
    """Where the claims are. Errors: ValueError where the installation has none."""
    for place in config.experiment_dirs():
        if (place / "claims").is_dir():
            return place / "claims"
    raise ValueError("claims: this installation has no experiments/claims")


def load() -> dict[str, Claim]:
    """Every claim by its id, in the order of sections and numbers."""
    found = [parse(path) for path in folder().glob("[abc][0-9]*.py")]
    found.sort(key=lambda claim: (claim.section, int(claim.id[1:])))
    twice = [claim.id for i, claim in enumerate(found) if claim.id in {c.id for c in found[:i]}]
    if twice:
        raise ValueError(f"claims: {twice[0]} is claimed by two files")
    return {claim.id: claim for claim in found}


def choose(names: list[str], known: dict[str, Claim]) -> list[Claim]:
    """The claims of these ids, file names, or file names without the id.

    Errors: ValueError naming the first that there is not, and one nearly like it.
    """
    by_name = {c.name: c for c in known.values()} | {
        c.name.partition("_")[2]: c for c in known.values()
    }
    chosen = []
    for name in names:
        claim = known.get(name.upper()) or by_name.get(name.lower())
        if claim is None:
            near = sections.nearest(name, [*known, *by_name])
            raise ValueError(f"reproduce: there is no claim {name!r}; {near}")
        chosen.append(claim)
    return chosen
