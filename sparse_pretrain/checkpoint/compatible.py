"""Which keys of a config a resumed run may change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHOWN = 6  # differing keys of a refusal: another experiment differs in dozens
# Sections that change neither the arrays nor what they are trained on.
FREE = ("checkpoint", "log", "eval", "sample", "credit", "name", "workdir")
FREE_KEYS = ("data.cache",)  # where prepared text is kept
# A longer run stretches the schedule, and another split of the work rounds differently: allowed,
# and said.
NOTED = ("steps", "tokens", "accumulate", "plan", "mesh", "exchange", "context", "pipeline",
         "offload", "model.remat")  # fmt: skip


def differing(saved: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, new value) wherever two resolved configs differ."""
    a, b = _dotted(json.loads(json.dumps(saved))), _dotted(json.loads(json.dumps(new)))
    absent = "absent"
    pairs = {k: (a.get(k, absent), b.get(k, absent)) for k in {**a, **b}}
    return {k: v for k, v in sorted(pairs.items()) if v[0] != v[1]}


def check_compatible(
    saved: Mapping[str, Any], new: Mapping[str, Any], workdir: str | Path = ""
) -> list[str]:
    """Notes on what a resumed run does otherwise than the one it resumes, one line each.

    Keys of FREE sections may change silently and those in NOTED with a note; everything else
    shapes the state or what it is fed.
    Errors: ValueError naming the workdir and the other differing keys, the first SHOWN with both
    values.
    """
    notes, refused = [], []
    for key, (old, now) in differing(saved, new).items():
        if key in NOTED:
            notes.append(f"{key}: {old!r} before, {now!r} from here on")
        elif key.split(".", 1)[0] not in FREE and key not in FREE_KEYS:
            refused.append(f"{key}: {old!r} there, {now!r} here")
    if refused:
        where, more = str(workdir) or "the workdir", len(refused) - SHOWN
        shown = "; ".join(refused[:SHOWN]) + (f"; and {more} keys more" if more > 0 else "")
        raise ValueError(f"{where} holds a run of another config: {shown}; use a new workdir")
    return notes


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _dotted(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
