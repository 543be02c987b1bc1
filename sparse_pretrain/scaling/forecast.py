"""Forecasts from a fitted law: the loss of a run before it is run, and where that is known to hold.

A forecast says how far it reaches beyond the runs that were fitted: `inside`, `extrapolated` up to
REACH times beyond, or `outside` where nothing supports it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain.scaling.fit import laws, record

REACH = 4.0  # times beyond the fitted span: as far as the planted laws and our own runs were tested


def loss(fit: record.Fit, **columns: float) -> dict[str, Any]:
    """The loss of a run with these columns: params (FLOPs per token over 6) and tokens, and what
    else the law takes.

    Returns `loss`, `interval` (95 %, of the run's loss), `law_interval` (of the law alone),
    `half_width` over the loss, `validity` and `reach`, the largest factor beyond the fitted span.
    Units: nats/token. Errors: ValueError naming a column that is missing or not positive.
    """
    found = laws.find(fit.kind)
    given = {}
    for name in found.columns:
        value = columns.get(name)
        if value is None or not value > 0:
            raise ValueError(f"{name}: the law {fit.kind} needs it positive, got {value}")
        given[name] = np.array([float(value)])
    features = found.build(given)
    middle, low, high = (float(x[0]) for x in fit.predict(features))
    _, law_low, law_high = (float(x[0]) for x in fit.predict(features, runs=False))
    spans = {k: float(v[0]) for k, v in given.items()}
    spans["flops"] = 6 * spans["params"] * spans["tokens"]
    said, reach = validity(fit, spans)
    return {
        "loss": middle,
        "interval": [low, high],
        "law_interval": [law_low, law_high],
        "half_width": (high - low) / 2 / middle,
        "validity": said,
        "reach": reach,
    }


def validity(fit: record.Fit, columns: Mapping[str, float]) -> tuple[str, float]:
    """(what the fitted span says of a point, how many times beyond it the point is at most)."""
    worst, at = 1.0, ""
    for name, value in columns.items():
        low, high = fit.span[name]
        beyond = max(value / high, low / value, 1.0)
        if beyond > worst:
            worst, at = beyond, name
    if worst <= 1 + 1e-6:
        return "inside the fitted runs", 1.0
    low, high = fit.span[at]
    where = f"{at} {columns[at]:.3g} is {worst:.3g} times beyond {low:.3g} to {high:.3g}"
    if worst <= REACH * (1 + 1e-9):
        return f"extrapolated: {where}", worst
    return f"outside validity: {where}, more than {REACH:g} times", worst


def optimal(fit: record.Fit, budgets: Sequence[float] = (), expansion: float = 1.0) -> list[dict]:
    """The best size and tokens at each budget; by default the largest fitted, 4 and 16 times it.

    `expansion` is for the joint law. A law with another term has no such split: an empty list.
    Units: budgets FLOPs.
    """
    if fit.kind == "sparse_attention":
        return []
    five = laws.dense(fit.theta, fit.kind, expansion)
    many = laws.dense(fit.samples, fit.kind, expansion)
    out = []
    for flops in budgets or [fit.span["flops"][1] * k for k in (1, REACH, REACH**2)]:
        params, tokens, value = (float(x) for x in laws.optimum(five, flops))
        drawn = laws.optimum(many, flops)
        (n_low, n_high), (d_low, d_high), (l_low, l_high) = (
            [float(x) for x in np.nanpercentile(d, [2.5, 97.5])] for d in drawn
        )
        out.append(
            {
                "flops": float(flops),
                "params": params,
                "params_interval": [n_low, n_high],
                "tokens": tokens,
                "tokens_interval": [d_low, d_high],
                "tokens_per_param": tokens / params,
                "loss": value,
                "loss_interval": [l_low, l_high],
                "validity": validity(fit, {"flops": flops, "params": params, "tokens": tokens})[0],
            }
        )
    return out


def read(path: Path | str) -> record.Fit:
    """The fit of a file, or of a folder that holds fit.json. Errors: ValueError as record.read."""
    path = Path(path).expanduser()
    return record.read(path / "fit.json" if path.is_dir() else path)
