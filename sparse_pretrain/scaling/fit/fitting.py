"""Fits a law to a table of runs: outliers by rule, many starts, intervals by bootstrap."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import sparse_pretrain
from sparse_pretrain.scaling.fit import batched, law, laws, record, solve, tables

BOOTSTRAP = 400
HELD_OUT = 0.2  # of the runs, those of the most compute, forecast by a fit to the others
FLOOR = 1e-3  # of the loss: residuals below it are no outliers, however exact the law is
STARTS = 16  # of the grid that are followed; tests hold the result to more


def fit(
    table: tables.Table,
    kind: str = "chinchilla",
    *,
    drop: str = "rule",
    bootstrap: int = BOOTSTRAP,
    delta: float = law.DELTA,
    seed: int = 0,
    follow: int = STARTS,
    provenance: Mapping[str, Any] | None = None,
) -> record.Fit:
    """The law `kind` of the table's losses.

    `drop` is 'rule' (tables.RULE), 'none', or 'highest:K' for the K highest losses. Refits with
    random weights on the runs (a Bayesian bootstrap) give percentile intervals; a fit without the
    runs of most compute forecasts those, and its error is `held_out`.
    Errors: ValueError naming the column or the number of runs when the table does not suffice.
    Source: as `laws.find(kind).source`.
    """
    found = laws.find(kind)
    keep, dropped, rule = _drop(table, found, drop, delta, follow)
    kept = table.take(keep)
    size = len(found.parameters)
    if len(kept) <= size:
        raise ValueError(
            f"runs: {len(kept)} of {len(table)} are left, and the law {kind} has {size} parameters"
        )
    _determined(kept, found)
    features = found.build(columns(kept, found.columns))
    target = np.log(kept.loss)
    best = _solve(features, target, found, delta, follow)
    rng = np.random.default_rng(seed)
    free = len(kept) - size
    spread = _widening(len(kept), free) ** 2
    samples = batched.minimise(
        features,
        np.tile(target, (bootstrap, 1)),
        rng.gamma(1 / spread, spread, size=(bootstrap, len(kept))),
        best.theta,
        delta=delta,
    )
    rest = target - law.values(features, best.theta)
    constants = {k: float(v) for k, v in found.constants(best.theta).items()}
    tail = 50 * (1 - record.CONFIDENCE)
    intervals = {
        k: (float(np.percentile(v, tail)), float(np.percentile(v, 100 - tail)))
        for k, v in found.constants(samples).items()
    }
    named = {k: kept.column(k) for k in ("flops", "loss", *found.columns)}
    return record.Fit(
        kind=kind,
        theta=best.theta,
        samples=samples,
        constants=constants,
        intervals=intervals,
        dropped=dropped,
        rule=rule,
        runs=len(kept),
        objective=best.loss,
        delta=delta,
        noise=float(np.sqrt((rest**2).sum() / free)),
        span={k: (float(v.min()), float(v.max())) for k, v in named.items()},
        held_out=_held_out(kept, found, delta, follow),
        provenance={
            "formula": found.formula,
            "method": f"sum of Huber losses of log loss, delta {delta:g}; the best of "
            f"{len(found.starts())} starts; {bootstrap} refits with random weights on the runs "
            f"(gamma of mean 1, variance {spread:.3g} for {free} degrees of freedom), seed {seed}",
            "law_source": found.source,
            "data": table.source,
            "sha256": table.sha256,
            "program": f"sparse-pretrain {sparse_pretrain.__version__}",
            **(provenance or {}),
        },
    )


def _widening(runs: int, free: int) -> float:
    """What a bootstrap of few runs is too narrow by, and Student's quantile over the normal's.

    Resampled residuals are those of a fit, smaller by sqrt(free / runs) than those of the law. The
    weights' variance is its square, so that every refit is a law of its own: moving the refits
    apart in their parameters would leave the curved valley they lie in, and forecast nonsense.
    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), 9.4 and 12.4; Rubin,
    "The Bayesian bootstrap" (1981), whose weights have variance 1.
    """
    from scipy.special import ndtri, stdtrit

    tail = 0.5 + record.CONFIDENCE / 2
    return float(np.sqrt(runs / free) * stdtrit(free, tail) / ndtri(tail))


def columns(table: tables.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The table's columns by name. Errors: ValueError naming one that it does not have."""
    return {name: table.column(name) for name in names}


def _solve(features, target, found: laws.Law, delta: float, follow: int) -> solve.Found:
    objective = law.Objective(features, target, np.ones(len(target)), delta)
    return solve.minimise(objective, found.starts(), follow=follow)


def _determined(table: tables.Table, found: laws.Law) -> None:
    """ValueError when a column never changes: no run tells its exponent from a factor."""
    for name in found.columns:
        values = np.log(table.column(name))
        if np.ptp(values) < 1e-9:
            raise ValueError(f"{name}: is the same in all runs, so its exponent cannot be fitted")


def _drop(table, found, drop: str, delta: float, follow: int):
    """(which runs stay, what is said of the others, the rule)."""
    head, _, count = drop.partition(":")
    keep, reasons = np.ones(len(table), bool), {}
    if drop == "rule":
        rule = tables.RULE
        for i in np.flatnonzero(tables.undertrained(table)):
            keep[i] = False
            ratio = table.tokens[i] / table.params[i]
            reasons[i] = f"{ratio:.3g} tokens per parameter"
        while keep.sum() > len(found.parameters):
            kept = table.take(keep)
            features = found.build(columns(kept, found.columns))
            best = _solve(features, np.log(kept.loss), found, delta, min(follow, 6))
            rest = np.log(kept.loss) - law.values(features, best.theta)
            far = np.abs(rest) > tables.DIVERGED * max(tables.spread(rest), FLOOR)
            for i, off in zip(np.flatnonzero(keep)[far], rest[far], strict=True):
                keep[i] = False
                reasons[i] = f"{100 * off:+.1f} % off the law"
            if not far.any():
                break
    elif drop == "none":
        rule = "no run is dropped"
    elif head == "highest" and count.isdigit() and int(count) < len(table):
        rule = f"the {count} highest losses are dropped"
        for i in np.argsort(-table.loss, kind="stable")[: int(count)]:
            keep[i], reasons[i] = False, "among the highest losses"
    else:
        raise ValueError(
            f"drop: must be rule, none or highest:K with K below {len(table)} runs, got {drop!r}"
        )
    said = tuple(
        {
            "run": table.label(int(i)),
            "params": float(table.params[i]),
            "tokens": float(table.tokens[i]),
            "loss": float(table.loss[i]),
            "reason": reasons[i],
        }
        for i in sorted(reasons, key=lambda i: -table.loss[i])
    )
    return keep, said, rule


def _held_out(table, found, delta: float, follow: int) -> dict[str, Any] | None:
    """How well a fit to the runs of less compute forecasts those of the most."""
    edge = np.quantile(table.flops, 1 - HELD_OUT)
    early = table.flops <= edge * (1 + 1e-9)
    if early.all() or early.sum() <= len(found.parameters) + 1:
        return None
    first, last = table.take(early), table.take(~early)
    features = found.build(columns(first, found.columns))
    best = _solve(features, np.log(first.loss), found, delta, min(follow, 6))
    forecast = np.exp(law.values(found.build(columns(last, found.columns)), best.theta))
    off = np.abs(forecast / last.loss - 1)
    return {
        "fitted_runs": len(first),
        "forecast_runs": len(last),
        "fitted_up_to_flops": float(first.flops.max()),
        "forecast_up_to_flops": float(last.flops.max()),
        "mean_abs_error": float(off.mean()),
        "max_abs_error": float(off.max()),
    }
