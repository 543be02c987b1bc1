"""Claims B3 and B7: the routed scaling law, and what it says of models with more experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_pretrain.scaling.published import files

# Clark et al. (2202.01169), table 3, and the size beyond which routing no longer helps
PUBLISHED = {
    "S-Base": {"a": -0.082, "b": -0.108, "c": 0.009, "cutoff": 937e9},
    "RL-R": {"a": -0.083, "b": -0.126, "c": 0.012, "cutoff": 85e9},
    "Hash": {"a": -0.087, "b": -0.136, "c": 0.012, "cutoff": 83e9},
}
ROUTERS = tuple(PUBLISHED)
HELD_OUT = 512
Runs = Sequence[dict[str, str]]


def runs(router: str) -> list[dict[str, str]]:
    """The last row of every run of a router and of the dense baselines: one expert a token in every
    other layer, and the seed that all routers share. Errors: files.Absent.
    """
    last: dict[str, dict[str, str]] = {}
    for row in files.rows("published/routed_scaling/curves.csv.gz"):
        kept = last.get(row["hyper_id"])
        if kept is None or int(row["step"]) > int(kept["step"]):
            last[row["hyper_id"]] = row
    return [
        row
        for row in last.values()
        if row["router_type"] in (router, "Dense")
        and row["k"] == "1"
        and row["seed"] == "42"
        and float(row["routing_frequency"]) == 0.5
        and float(row["flop_increase"]) == 1
    ]


def saturated(experts: np.ndarray, start: float, limit: float) -> np.ndarray:
    """The effective number of experts. Source: 2202.01169, equation 5."""
    with np.errstate(divide="ignore"):  # start and limit may meet on the way to a fit
        return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / limit)) + 1 / limit)


def _columns(rows: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    number = lambda key: np.array([float(row[key]) for row in rows])  # noqa: E731
    size, experts = number("dense_parameter_count"), number("num_experts")
    return np.log10(size), experts, np.log10(number("loss_validation"))


def value(theta: np.ndarray, log_size: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """log10 of the loss. Source: 2202.01169, equations 1 and 5."""
    a, b, c, d, start, limit = theta
    with np.errstate(all="ignore"):  # a trial step may leave where the logarithm is defined
        effective = np.log10(saturated(experts, np.exp(start), np.exp(limit)))
    effective = np.nan_to_num(effective, nan=1e6, posinf=1e6, neginf=-1e6)
    return a * log_size + b * effective + c * log_size * effective + d


def fit(rows: Runs) -> np.ndarray:
    """(a, b, c, d, log E_start, log E_max): least squares on log loss, the best of nine starts."""
    from scipy import optimize

    log_size, experts, loss = _columns(rows)
    rest = lambda t: value(t, log_size, experts) - loss  # noqa: E731
    found = []
    for start in (1.5, 3.0, 5.0):
        for limit in (200.0, 500.0, 2000.0):
            first = [-0.08, -0.1, 0.01, 1.1, np.log(start), np.log(limit)]
            found.append(
                optimize.least_squares(
                    rest, first, method="lm", xtol=1e-13, ftol=1e-13, gtol=1e-13, max_nfev=5000
                )
            )
    return min(found, key=lambda f: f.cost).x


def refit(router: str) -> dict[str, Any]:
    """Constants a, b, c, d, E_start, E_max, and `cutoff` where b + c log10 N is zero.

    Errors: files.Absent. Source: 2202.01169, table 3 and section 5.
    """
    rows = runs(router)
    a, b, c, d, start, limit = (float(x) for x in fit(rows))
    return {
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "E_start": float(np.exp(start)),
        "E_max": float(np.exp(limit)),
        "cutoff": 10 ** (-b / c),
        "runs": len(rows),
    }


def planner(router: str) -> dict[str, Any]:
    """The runs of 512 experts, forecast by an efficiency-leverage fit to those of fewer.

    A routed model of size N and E experts is as good as a dense one of N x leverage, where
    log10 leverage = (b + c log10 N) (log10 E' - log10 E'(1)) / a, and E' is saturated. The dense
    loss of each size is measured, not fitted: sizes differ in more than N.
    Returns by size the loss, the forecast and the error in percent; `mean` and `worst` of them.
    Errors: files.Absent. Source: none; the form is 2202.01169's law solved for the dense size.
    """
    from scipy import optimize

    rows = runs(router)
    few = [row for row in rows if int(row["num_experts"]) < HELD_OUT]
    many = [row for row in rows if int(row["num_experts"]) == HELD_OUT]
    sizes = sorted({row["model_size_label"] for row in rows})

    def design(part: Runs, shape: np.ndarray) -> np.ndarray:
        log_size, experts, _ = _columns(part)
        start, limit = np.exp(shape)
        one = saturated(np.ones(1), start, limit)
        gain = np.log10(saturated(experts, start, limit) / one)
        own = [[float(row["model_size_label"] == s) for s in sizes] for row in part]
        return np.column_stack([np.array(own), gain, log_size * gain])

    target = _columns(few)[2]

    def solve(shape):
        x = design(few, shape)
        weights = np.linalg.lstsq(x, target, rcond=None)[0]
        return x @ weights - target, weights

    found = [
        optimize.least_squares(lambda s: solve(s)[0], np.log(first))
        for first in ((1.5, 300.0), (4.0, 600.0), (2.0, 1500.0))
    ]
    best = min(found, key=lambda f: f.cost).x
    weights = solve(best)[1]
    forecast, measured = 10 ** (design(many, best) @ weights), 10 ** _columns(many)[2]
    off = 100 * (forecast / measured - 1)
    slope = fit(few)[0]
    at, _, _ = _columns(many)
    start, limit = np.exp(best)
    gain = saturated(np.array([float(HELD_OUT)]), start, limit) / saturated(
        np.ones(1), start, limit
    )
    leverage = 10 ** ((weights[-2] + weights[-1] * at) * np.log10(gain) / slope)
    by_size = {
        row["model_size_label"]: {
            "loss": float(measured[i]),
            "forecast": float(forecast[i]),
            "error_percent": float(off[i]),
            "leverage": float(leverage[i]),
        }
        for i, row in enumerate(many)
    }
    return {
        "by_size": by_size,
        "mean": float(np.abs(off).mean()),
        "worst": float(np.abs(off).max()),
        "fitted_runs": len(few),
    }
