"""Block sizes of a call: the argument, else what was tuned for this kind of device, else a guess.

Nothing is tuned here, so never inside a training run: `python -m kernels_pallas.tune` does it and
writes `tuned/<device_kind>/<op>.json`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels_pallas import device

FOLDER = Path(__file__).parent / "tuned"

Blocks = dict[str, int]
Name = tuple[str, str, str]  # op, backend, and the workload as JSON


@dataclasses.dataclass(frozen=True)
class Request:
    """What a backend asked for while it was traced: its own guess, and what else may be tried."""

    name: Name
    guess: Blocks
    others: tuple[Blocks, ...]


_trial: contextvars.ContextVar[Mapping[Name, Blocks] | None] = contextvars.ContextVar(
    "trial", default=None)
_asked: contextvars.ContextVar[dict[Name, Request] | None] = contextvars.ContextVar(
    "asked", default=None)


@contextlib.contextmanager
def trying(blocks: Mapping[Name, Blocks]) -> Iterator[None]:
    """Take these where they are asked for, before any file: for the tuner, and for tests.

    As with `device.assume`, trace a function made inside.
    """
    token = _trial.set(blocks)
    try:
        yield
    finally:
        _trial.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[dict[Name, Request]]:
    """Note every request made inside that no argument answers."""
    token = _asked.set({})
    try:
        found = _asked.get()
        assert found is not None
        yield found
    finally:
        _asked.reset(token)


def name_of(op: str, backend: str, workload: Mapping[str, Any]) -> Name:
    """Return what a request of this backend for this workload is called."""
    return op, backend, json.dumps(dict(workload), sort_keys=True)


def choose(op: str, backend: str, workload: Mapping[str, Any], guess: Blocks,
           others: Sequence[Blocks] = (), **given: int | None) -> Blocks:
    """Return the blocks for a workload: those given, else the tuned ones, else the guess.

    What is given decides alone: a file holds for its own combination. `others` are what the
    backend can run beside its guess; a file that names anything else is out of date.
    Errors: ValueError for a file that is damaged or out of date.
    """
    if any(n is not None for n in given.values()):
        return guess | {k: n for k, n in given.items() if n is not None}
    name = name_of(op, backend, workload)
    asked = _asked.get()
    if asked is not None:
        asked[name] = Request(name, guess, tuple(b for b in others if b != guess))
    found = (_trial.get() or {}).get(name)
    if found is not None:
        return found
    path = FOLDER / device.kind() / f"{op}.json"
    found = _read(path).get(name[1:])
    if found is not None and found not in (guess, *others):
        raise ValueError(f"{path}: blocks={found} of {backend} for {name[2]} is none of what it "
                         f"runs; tune again, or delete the file")
    return guess if found is None else found


@functools.cache
def _read(path: Path) -> dict[tuple[str, str], Blocks]:
    """The entries of a file by backend and workload, none where there is no file."""
    return {(e["backend"], json.dumps(e["workload"], sort_keys=True)): e["blocks"]
            for e in load(path)["entries"]}


def load(path: Path) -> dict[str, Any]:
    """Return a file's contents, with no entries where there is none.

    Errors: ValueError naming the file and what of it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {"entries": []}
    def refuse(what):
        return ValueError(f"{path}: {what}; tune again, or delete the file")

    try:
        whole = json.loads(text)
    except ValueError as e:
        raise refuse(f"no JSON: {e}") from None
    entries = whole.get("entries") if isinstance(whole, dict) else None
    if not isinstance(entries, list):
        raise refuse("entries: expected a list")
    for i, entry in enumerate(entries):
        kinds = (("backend", str), ("workload", dict), ("blocks", dict))
        for field, kind in kinds:
            value = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(value, kind):
                raise refuse(f"entries[{i}].{field}: got {value!r}, expected a {kind.__name__}")
        for key, n in entry["blocks"].items():
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise refuse(f"entries[{i}].blocks.{key}: got {n!r}, expected a number above 0")
    return whole


def store(path: Path, whole: Mapping[str, Any]) -> None:
    """Write a file, all or nothing; calls traced from now on read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    _read.cache_clear()
