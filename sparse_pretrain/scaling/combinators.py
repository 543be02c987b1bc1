"""Sweeps as lists of overrides, the few ways to combine them, and searches over spaces of them."""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a search may give a key: between two numbers, or one of `values`."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: int = 0  # above 0: whole numbers, `step` apart
    values: tuple[Any, ...] = ()

    def __post_init__(self):
        if self.values:
            return
        if not self.low < self.high:
            raise ValueError(f"{self.key}: low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"{self.key}: a logarithmic range begins above 0, not at {self.low}")
        if self.step < 0:
            raise ValueError(f"{self.key}: step is {self.step}, below 1")


def uniform(key: str, low: float, high: float) -> Range:
    """Any number between two: uniform('optim.weight_decay', 0.0, 0.3)."""
    return Range(key, low, high)


def log_uniform(key: str, low: float, high: float) -> Range:
    """Any number between two, equal factors equally likely: log_uniform('optim.lr', 1e-4, 1e-1)."""
    return Range(key, low, high, log=True)


def integers(key: str, low: int, high: int, *, step: int = 1) -> Range:
    """Whole numbers, both ends among them: integers('model.width', 64, 512, step=64)."""
    return Range(key, low, high, step=step)


def choice(key: str, values: Iterable[Any]) -> Range:
    """One of some values: choice('optim.kind', ['muon', 'adamw'])."""
    found = tuple(values)
    if not found:
        raise ValueError(f"{key}: a choice of no values")
    return Range(key, values=found)


SAMPLERS, PRUNERS = ("tpe", "cma", "random", "grid"), ("none", "asha", "median")


@dataclasses.dataclass(frozen=True)
class Search:
    """See `search`."""

    experiment: str
    space: tuple[Range, ...]
    trials: int
    sampler: str
    pruner: str
    seed: int
    parallel: int
    metric: str
    maximize: bool
    fixed: Mapping[str, Any]
    warmup: int
    factor: int


def search(
    experiment: str,
    space: Sequence[Range],
    *,
    trials: int,
    sampler: str = "tpe",
    pruner: str = "none",
    seed: int = 0,
    parallel: int = 4,
    metric: str = "bits_per_byte",
    maximize: bool = False,
    fixed: Mapping[str, Any] | None = None,
    warmup: int = 0,
    factor: int = 3,
) -> Search:
    """`trials` settings of an experiment, each chosen from what earlier ones reached.

    An entry of what `get_sweep` returns; several, for several experiments, get their trials each.
    Trial n is chosen, and pruned, by the results of trials up to n - `parallel` only, so that a
    search is the same for any number of workers, however fast, and after any interruption; with
    more than `parallel` workers some wait. `sampler` is tpe, cma (two or more numbers), random or
    grid (choices only); `pruner` is none, asha (the better 1 of `factor` goes on, from `warmup`
    steps on) or median. Pruning reads `metric` in eval.jsonl, the end result is summary.json's.
    `fixed` is set in every trial. A run that fails by itself is a failed trial, and counts; one
    that was killed is not, and runs again.
    Errors: ValueError naming the field.
    """
    space = tuple(space)
    keys = [r.key for r in space] + list(fixed or {})
    twice = sorted({k for k in keys if keys.count(k) > 1})
    for good, text in (
        (bool(space), "space: nothing to search"),
        (not twice, f"{twice[0] if twice else ''}: set twice"),
        (sampler in SAMPLERS, f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}"),
        (pruner in PRUNERS, f"pruner: {pruner!r} is not one of {', '.join(PRUNERS)}"),
        (trials >= 1, f"trials: {trials} is below 1"),
        (parallel >= 1, f"parallel: {parallel} is below 1"),
        (factor >= 2, f"factor: {factor} is below 2"),
    ):
        if not good:
            raise ValueError(text)
    choices = [r.key for r in space if r.values]
    if sampler == "grid" and len(choices) < len(space):
        other = next(r.key for r in space if not r.values)
        raise ValueError(f"sampler: 'grid' takes choices, and {other!r} is a range")
    if sampler == "cma" and (choices or len(space) < 2):
        why = f"{choices[0]!r} is a choice" if choices else f"there is {len(space)}"
        raise ValueError(f"sampler: 'cma' takes two or more numbers, and {why}")
    return Search(
        experiment,
        space,
        trials,
        sampler,
        pruner,
        seed,
        parallel,
        metric,
        maximize,
        dict(fixed or {}),
        warmup,
        factor,
    )
