"""Random numbers as a function of where they are used, so that nothing has to be replayed."""

from __future__ import annotations

from typing import Any

import numpy as np
from grain.experimental import index_shuffle

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw(*key: Any) -> np.ndarray:
    """64 random bits for every combination of integers in `key`, which broadcast together.

    The same on every machine and numpy version.

    Source: Steele, Lea and Flood 2014, SplitMix64, its finaliser chained over the key.
    """
    with np.errstate(over="ignore"):
        bits = np.asarray(0, np.uint64)
        for part in key:
            bits = (np.asarray(part).astype(np.uint64) + _GOLDEN * (bits + np.uint64(1))) ^ bits
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = np.asarray(bits ^ (bits >> np.uint64(31)))
    return np.asarray(bits)


def below(limit: int, *key: Any) -> np.ndarray:
    """Integers in [0, limit), int64; the bias is under limit / 2^64."""
    return (draw(*key) % np.uint64(limit)).astype(np.int64)


def permutation(size: int, *key: int) -> np.ndarray:
    """All of [0, size) in a random order."""
    return np.argsort(draw(*key, np.arange(size)), kind="stable")


def shuffled(numbers: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where `numbers` stand in a random order of [0, size), without making all of it.

    Source: grain's `index_shuffle`, the permutation behind `MapDataset.shuffle`.
    """
    seed = int(draw(*key) >> np.uint64(32))
    return np.array(
        [index_shuffle(int(n), max_index=size - 1, seed=seed, rounds=4) for n in numbers], np.int64
    )
