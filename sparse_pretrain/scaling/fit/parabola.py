"""Iso-FLOP parabolas: the least loss of each budget, and how it moves with compute.

Known bias: a parabola in log N is symmetric and the law is not. Where alpha and beta differ, or the
sizes of a budget do not lie evenly about its optimum, the vertex is shifted towards the side that
was sampled wider, by more the wider the sizes span; the shift is part of every budget, so it does
not average out and no interval here holds it. `bias` measures it where a parametric fit of the
same runs exists: parabolas through that law's own losses at the same sizes, against its true
optimum.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_pretrain.scaling.fit import law, laws, record

STATED_BIAS = (
    "a parabola is symmetric in log N and the law is not: the vertex moves towards the side that "
    "was sampled wider, and its interval does not hold that"
)


def vertex(params: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """The least point of the parabola of loss in log params.

    `inside` says whether it opens upwards and its vertex lies within the sizes; where it does not,
    the budget has no measured optimum. Units: `curvature` nats per squared log-unit.
    Errors: ValueError below three sizes.
    Source: Hoffmann et al. (2203.15556), approach 2.
    """
    if len(np.unique(params)) < 3:
        raise ValueError(f"params: a parabola takes 3 sizes, got {len(np.unique(params))}")
    x = np.log(params)
    middle = x.mean()
    a, b, c = np.polyfit(x - middle, loss, 2)
    at = middle - b / (2 * a) if a > 0 else np.nan
    inside = bool(a > 0 and x.min() <= at <= x.max())
    return {
        "params": float(np.exp(at)),
        "loss": float(c - b * b / (4 * a)) if a > 0 else float("nan"),
        "curvature": float(a),
        "inside": inside,
        "coefficients": [float(a), float(b), float(c), float(middle)],
    }


def budgets(budget: np.ndarray, params: np.ndarray, loss: np.ndarray) -> list[dict[str, Any]]:
    """A vertex per budget of three sizes or more, cheapest first, with the tokens of C = 6 N D."""
    out = []
    for flops in np.unique(budget):
        at = budget == flops
        if len(np.unique(params[at])) >= 3:
            found = vertex(params[at], loss[at])
            tokens = flops / 6 / found["params"]
            out.append({"flops": float(flops), "tokens": float(tokens)} | found)
    return out


def exponent(found: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """N_opt = factor x C^exponent through the vertices inside their sizes, with a 95 % interval.

    None below three such budgets.
    """
    good = [row for row in found if row["inside"]]
    if len(good) < 3:
        return None
    from scipy import stats

    x, y = (np.log([row[k] for row in good]) for k in ("flops", "params"))
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(good) - 2)) * line.stderr
    return {
        "exponent": float(line.slope),
        "low": float(line.slope - half),
        "high": float(line.slope + half),
        "factor": float(np.exp(line.intercept)),
        "budgets": len(good),
    }


def bias(fit: record.Fit, budget: np.ndarray, params: np.ndarray) -> list[dict[str, float]]:
    """By budget the factor between the vertex of a noiseless parabola and the law's optimum."""
    out = []
    for flops in np.unique(budget):
        sizes = params[budget == flops]
        if len(np.unique(sizes)) < 3:
            continue
        features = laws.find("chinchilla").build({"params": sizes, "tokens": flops / 6 / sizes})
        found = vertex(sizes, np.exp(law.values(features, fit.theta)))
        best = float(laws.optimum(fit.theta, float(flops))[0])
        out.append({"flops": float(flops), "factor": found["params"] / best})
    return out
