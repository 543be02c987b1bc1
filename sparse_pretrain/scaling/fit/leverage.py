"""Efficiency leverage: how much more compute a dense model needs for a mixture's loss."""

from typing import Any

import numpy as np

from sparse_pretrain.scaling.fit import laws, record

# Tian et al. (2507.17702), equation 7 and table 4: logarithms of G to base 2, of C to base 10
LING = {"a": 1.23, "d": -7.61e-2, "gamma": 1.67e-2, "beta": -1.17e-1}
LING_START, LING_MAX = 1.63e-2, 5.28e16
WIDEST = 60.0  # of log C, the bracket a dense equal is looked for in


def ling(active: float, granularity: float, flops: float) -> float:
    """The published law: `active` ratio of activated experts, granularity 2 d_model over d_expert.

    Its runs span 3e18 to 3e20 FLOPs; elsewhere it is an extrapolation.
    Errors: ValueError for a ratio outside (0, 1].
    Source: 2507.17702, EL = A'^(alpha + gamma (log G)^2 + beta log G), alpha = a + d log C.
    """
    if not 0 < active <= 1:
        raise ValueError(f"active: must be in (0, 1], got {active}")
    start = 1 / (1 / LING_START - 1 / LING_MAX)
    saturated = 1 / (1 / (active + start) + 1 / LING_MAX)
    log_g = np.log2(granularity)
    power = LING["a"] + LING["d"] * np.log10(flops)
    return float(saturated ** (power + LING["gamma"] * log_g**2 + LING["beta"] * log_g))


def between(dense: record.Fit, sparse: record.Fit, flops: float) -> dict[str, Any]:
    """C_dense / C at which the dense law's best loss equals the sparse law's best at C.

    The interval pairs the two fits' refits; `unbounded` is the share of them in which the dense law
    reaches that loss at no compute.
    Errors: ValueError for laws of another kind.
    """
    value = _equal(dense.theta[None], sparse.theta[None], flops)[0]
    count = min(len(dense.samples), len(sparse.samples))
    drawn = _equal(dense.samples[:count], sparse.samples[:count], flops)
    known = np.where(np.isnan(drawn), np.inf, drawn)
    low, high = np.percentile(known, [2.5, 97.5], method="nearest")
    return {
        "flops": float(flops),
        "leverage": float(value),
        "interval": [float(low), float(high)],
        "unbounded": float(np.isinf(known).mean()),
    }


def _equal(dense: np.ndarray, sparse: np.ndarray, flops: float) -> np.ndarray:
    """By bisection in log C; infinite where the dense law ends above the loss."""
    with np.errstate(all="ignore"):
        target = np.asarray(laws.optimum(sparse, flops)[2])
        low = np.full(len(target), np.log(flops) - WIDEST)
        high = np.full(len(target), np.log(flops) + WIDEST)
        for _ in range(60):
            middle = (low + high) / 2
            above = _best(dense, middle) > target
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        found = np.exp((low + high) / 2 - np.log(flops))
        return np.where((low + high) / 2 > np.log(flops) + WIDEST - 1, np.inf, found)


def _best(five: np.ndarray, log_flops: np.ndarray) -> np.ndarray:
    """The optimum's loss at a budget of its own for each parameter vector."""
    a, b, e, alpha, beta = np.moveaxis(five, -1, 0)
    log_g = (np.log(alpha) + a - np.log(beta) - b) / (alpha + beta)
    log_n = log_g + beta / (alpha + beta) * (log_flops - np.log(6))
    log_d = log_flops - np.log(6) - log_n
    return np.exp(e) + np.exp(a - alpha * log_n) + np.exp(b - beta * log_d)
