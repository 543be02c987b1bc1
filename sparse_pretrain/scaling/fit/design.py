"""Which run to buy next: the one that narrows a forecast most for its compute."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_pretrain.scaling.fit import law, laws, record


def next_run(
    fit: record.Fit, candidates: Sequence[tuple[float, float]], target: tuple[float, float]
) -> list[dict[str, Any]]:
    """The candidates (params, tokens), best first, by how much each narrows the law at `target`.

    The refits' covariance S, a run's gradient g and the target's h give what one more run of the
    fit's own noise s takes off the target's variance: (h'Sg)^2 / (s^2 + g'Sg), over its FLOPs.
    `half_width` is the law's 95 % half-width at the target now, `after` with the run, both over
    the loss.
    Errors: ValueError without candidates. Source: Fedorov, "Theory of optimal experiments" (1972).
    """
    if not candidates:
        raise ValueError("candidates: none given")
    covariance = np.cov(fit.samples.T)
    goal = _gradients(fit, [target])[0]
    now = float(goal @ covariance @ goal)
    out = []
    for (params, tokens), slope in zip(candidates, _gradients(fit, candidates), strict=True):
        shared = float(goal @ covariance @ slope)
        gain = shared**2 / (fit.noise**2 + float(slope @ covariance @ slope))
        flops = 6 * params * tokens
        out.append(
            {
                "params": float(params),
                "tokens": float(tokens),
                "flops": float(flops),
                "half_width": 1.96 * now**0.5,
                "after": 1.96 * max(now - gain, 0.0) ** 0.5,
                "gain_per_flop": gain / flops,
            }
        )
    return sorted(out, key=lambda row: -row["gain_per_flop"])


def _gradients(fit: record.Fit, points: Sequence[tuple[float, float]]) -> np.ndarray:
    params, tokens = (np.array([p[i] for p in points]) for i in (0, 1))
    features = laws.find("chinchilla").build({"params": params, "tokens": tokens})
    return law.slopes(features, fit.theta)[1]
