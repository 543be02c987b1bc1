"""Laws of learning rate and batch: the best value of a sweep, and how it moves with scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Values = Sequence[float] | np.ndarray

# DeepSeek LLM (2401.02954), section 3.1, in FLOPs; Step Law (2503.04715), in params and tokens
DEEPSEEK = {
    "lr": {"factor": 0.3118, "flops": -0.1250},
    "batch": {"factor": 0.2920, "flops": 0.3271},
}
STEP_LAW = {
    "lr": {"factor": 1.79, "params": -0.713, "tokens": 0.307},
    "batch": {"factor": 0.58, "tokens": 0.571},
}


def best(values: Values, losses: Values, *, around: int = 5) -> dict[str, Any]:
    """The least point of a parabola in the log of a setting, through the points about the best.

    `inside` says whether the best value tried is interior to the grid; where it is not, the optimum
    may lie beyond it and `value` is the best tried. `bracket` are the tried values about it.
    Errors: ValueError below three values.
    """
    order = np.argsort(values)
    x, y = np.log(np.array(values, float)[order]), np.array(losses, float)[order]
    if len(x) < 3:
        raise ValueError(f"values: an optimum takes 3, got {len(x)}")
    at = int(y.argmin())
    inside = 0 < at < len(x) - 1
    bracket = [float(np.exp(x[max(at - 1, 0)])), float(np.exp(x[min(at + 1, len(x) - 1)]))]
    value, loss = float(np.exp(x[at])), float(y[at])
    if inside:
        low = max(0, min(at - around // 2, len(x) - around))
        part = slice(low, low + around)
        a, b, c = np.polyfit(x[part] - x[at], y[part], 2)
        if a > 0 and x[at - 1] <= x[at] - b / (2 * a) <= x[at + 1]:
            value, loss = float(np.exp(x[at] - b / (2 * a))), float(c - b * b / (4 * a))
    return {"value": value, "loss": loss, "inside": inside, "bracket": bracket}


def power(columns: Mapping[str, Values], optima: Values) -> dict[str, Any]:
    """optimum = factor x product of columns to their exponents, least squares in logarithms.

    Each exponent with a 95 % Student interval; `held_out` is the mean factor, less one, by which a
    fit without a point misses it.
    Errors: ValueError when there are no more points than constants.
    """
    from scipy import stats

    y = np.log(np.array(optima, float))
    x = np.column_stack([np.ones(len(y)), *(np.log(np.array(v, float)) for v in columns.values())])
    free = len(y) - x.shape[1]
    if free < 1:
        raise ValueError(f"optima: {len(y)} points for {x.shape[1]} constants")
    weights, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    if rank < x.shape[1]:
        raise ValueError(f"columns: {', '.join(columns)} do not vary apart in these points")
    rest = y - x @ weights
    spread = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * (rest @ rest) / free)
    half = float(stats.t.ppf(0.975, free)) * spread
    hat = np.einsum("ip,pq,iq->i", x, np.linalg.inv(x.T @ x), x)
    missed = np.abs(rest / np.maximum(1 - hat, 1e-9))
    names = ["factor", *columns]
    value = dict(zip(names, weights.tolist(), strict=True)) | {"factor": float(np.exp(weights[0]))}
    ends = {n: [float(w - h), float(w + h)] for n, w, h in zip(names, weights, half, strict=True)}
    ends["factor"] = [float(np.exp(v)) for v in ends["factor"]]
    return {
        "constants": value,
        "intervals": ends,
        "points": len(y),
        "held_out": float(np.expm1(missed).mean()),
    }


def evaluate(law: Mapping[str, float], **columns: float) -> float:
    """A power law's value: `factor` times each column to its exponent.

    Errors: ValueError naming a column that is not given.
    """
    out = law["factor"]
    for name, exponent in law.items():
        if name != "factor":
            if name not in columns:
                raise ValueError(f"{name}: the law needs it")
            out *= columns[name] ** exponent
    return float(out)
