"""Loads of experts over time: those that a run recorded, and made-up ones."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int


def from_rows(rows: Iterable[Mapping[str, Any]]) -> Int[np.ndarray, "T N E"]:
    """The `load` of every row of a run's `moe.jsonl`: pairs by look, layer and expert.

    A look is a row: short runs record every step, long ones about a hundred.
    Errors: ValueError when no row has loads, when they change shape, or are no whole numbers.
    """
    found: list[np.ndarray] = []
    for number, row in enumerate(rows, 1):
        if not row.get("load"):
            continue
        try:
            load = np.array(row["load"], np.float64)
        except (TypeError, ValueError):
            load = np.empty(0)
        if load.ndim != 2 or (found and load.shape != found[0].shape):
            want = f", before {found[0].shape}" if found else ", expected layers of equal experts"
            raise ValueError(f"load: row {number} has the shape {load.shape}{want}")
        if not np.isfinite(load).all() or (load < 0).any() or (load != np.round(load)).any():
            raise ValueError(f"load: row {number} holds no whole numbers of tokens")
        found.append(load)
    if not found:
        raise ValueError("load: no row has the loads of experts")
    return np.stack(found).astype(np.int64)


def zipf(
    *,
    steps: int,
    layers: int,
    experts: int,
    pairs: int,
    exponent: float,
    drift: float = 0.5,
    memory: float = 64.0,
    noise: float = 0.1,
    seed: int = 0,
) -> Int[np.ndarray, "T N E"]:
    """Loads whose popularity follows Zipf's law, drifts slowly and varies from batch to batch.

    An expert of rank r, random in every layer, has the popularity r^-exponent times exp(z): z is a
    stationary Gaussian process of first order with standard deviation `drift`, whose correlation
    falls by e in `memory` steps. Each batch multiplies it by exp(`noise` times a normal of its own)
    and draws `pairs` pairs, multinomially.
    Units: `pairs` (token, expert) pairs per batch; `memory` steps.
    Differs: pairs are drawn one by one, so an expert can have more of them than there are tokens,
    which top-k routing with k above 1 excludes.
    """
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, experts + 1)
    popular = np.stack([rng.permutation(-exponent * np.log(ranks)) for _ in range(layers)])
    keep = float(np.exp(-1 / memory))
    state = rng.normal(0, drift, popular.shape)
    out = np.empty((steps, layers, experts), np.int64)
    for step in range(steps):
        if step:
            state = keep * state + np.sqrt(1 - keep**2) * rng.normal(0, drift, state.shape)
        logits = popular + state + noise * rng.normal(size=state.shape)
        share = np.exp(logits - logits.max(1, keepdims=True))
        out[step] = rng.multinomial(pairs, share / share.sum(1, keepdims=True))
    return out
