"""A count model to hold character results against: Witten-Bell n-grams, no training at all."""

import numpy as np


def nats(train: np.ndarray, heldout: np.ndarray, vocab: int, order: int) -> float:
    """Nats per symbol of `heldout` given the `order` symbols before it, counted in `train`.

    The chance of a symbol after a context is its count, plus the number of different symbols seen
    there times the chance after the next shorter context, over both numbers' sum. A context never
    seen has the shorter one's. Below the shortest every symbol is as likely.
    Source: Witten and Bell, IEEE Trans. Information Theory 37 (1991); Chen and Goodman (1996).
    """
    if vocab ** (order + 1) >= 2**63:
        raise ValueError(f"order: {vocab} symbols to the power of {order + 1} do not fit 63 bits")
    text = np.concatenate([train[len(train) - order :], heldout])
    chance = np.full(len(heldout), 1.0 / vocab)
    for n in range(1, order + 2):
        grams, seen = np.unique(_codes(train, n, vocab), return_counts=True)
        contexts, start = np.unique(grams // vocab, return_index=True)
        total = np.add.reduceat(seen, start)
        kinds = np.diff(np.append(start, len(grams)))
        asked = _codes(text, n, vocab)[-len(heldout) :]
        count = _look_up(grams, seen, asked)
        all_, different = (_look_up(contexts, x, asked // vocab) for x in (total, kinds))
        known = all_ > 0
        mixed = (count + different * chance) / np.maximum(all_ + different, 1)
        chance = np.where(known, mixed, chance)
    return float(-np.mean(np.log(chance)))


def _codes(text: np.ndarray, n: int, vocab: int) -> np.ndarray:
    """Every run of n symbols as one number."""
    text = text.astype(np.int64)
    size = len(text) - n + 1
    code = np.zeros(size, np.int64)
    for i in range(n):
        code = code * vocab + text[i : i + size]
    return code


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each asked key, 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
