"""Sweeps as lists of overrides, and the few ways to combine them."""

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

Overrides = dict[str, Any]
Sweep = list[Overrides]


def param(key: str, values: Iterable[Any]) -> Sweep:
    """One setting per value of a dotted config key: param('optim.lr', [1e-3, 2e-3])."""
    return [{key: value} for value in values]


def _merge(parts: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        twice = sorted(merged.keys() & part.keys())
        if twice:
            raise ValueError(
                f"{twice[0]}: set twice, to {merged[twice[0]]!r} and {part[twice[0]]!r}"
            )
        merged |= part
    return merged


def prod(*sweeps: Sequence[Overrides]) -> Sweep:
    """Every combination, the last sweep moving fastest.

    Errors: ValueError when two sweeps set one key.
    """
    return [_merge(parts) for parts in itertools.product(*sweeps)]


def chain(*sweeps: Sequence[Overrides]) -> Sweep:
    """One sweep after the other."""
    return [dict(overrides) for sweep in sweeps for overrides in sweep]


def zipit(*sweeps: Sequence[Overrides]) -> Sweep:
    """The first settings together, then the second ones, and so on.

    Errors: ValueError when the lengths differ, or two sweeps set one key.
    """
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ValueError(f"sweeps: zipit needs equal lengths, got {lengths}")
    return [_merge(parts) for parts in zip(*sweeps, strict=True)]


def sample(sweep: Sequence[Overrides], count: int, *, seed: int = 0) -> Sweep:
    """`count` different settings of a sweep, in its order, the same for the same seed.

    Errors: ValueError when the sweep has fewer.
    """
    if not 0 <= count <= len(sweep):
        raise ValueError(f"count: {count} of a sweep of {len(sweep)}")
    picked = random.Random(seed).sample(range(len(sweep)), count)
    return [dict(sweep[i]) for i in sorted(picked)]


def runs(experiment: str, sweep: Sequence[Overrides]) -> list[tuple[str, Overrides]]:
    """An experiment (path, or path:arg) under every setting: what `get_sweep` returns."""
    return [(experiment, dict(overrides)) for overrides in sweep]
