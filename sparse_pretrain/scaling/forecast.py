"""Forecasts from a fitted law: the loss of a run before it is run, and where that is known to hold.

A forecast says how far it reaches beyond the runs that were fitted: `inside`, `extrapolated` up to
REACH times beyond, or `outside` where nothing supports it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain import config as configs
from sparse_pretrain.planning import flops
from sparse_pretrain.scaling.fit import accuracy, laws, record

SHIPPED = Path(__file__).with_name("fit") / "shipped"
REACH = 4.0  # times beyond the fitted span: as far as the planted laws and our own runs were tested


def loss(fit: record.Fit, **columns: float) -> dict[str, Any]:
    """The loss of a run with these columns: params (FLOPs per token over 6) and tokens, and what
    else the law takes.

    Returns `loss`, `interval` (95 %, of the run's loss), `law_interval` (of the law alone),
    `half_width` over the loss, `validity` and `reach`, the largest factor beyond the fitted span,
    and `accuracy`, what the loss says of each task that the fitted runs were scored on.
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
        "accuracy": accuracies(fit, middle, [low, high], said),
    }


def accuracies(
    fit: record.Fit, loss: float, interval: Sequence[float], validity: str
) -> list[dict[str, Any]]:
    """Accuracy at a forecast loss, a row per task; a row without one says why.

    A loss that lies outside the law's validity says nothing of accuracy.
    """
    none = {"task": "", "accuracy": None, "interval": None}
    if not fit.accuracy:
        return [none | {"validity": accuracy.NONE}]
    curves = [accuracy.from_json(curve) for curve in fit.accuracy]
    if validity.startswith(accuracy.OUTSIDE):
        why = f"{accuracy.OUTSIDE}: the loss itself is"
        return [none | {"task": curve.task, "validity": why} for curve in curves]
    return [accuracy.predict(curve, loss, interval) for curve in curves]


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
    for budget in budgets or [fit.span["flops"][1] * k for k in (1, REACH, REACH**2)]:
        params, tokens, value = (float(x) for x in laws.optimum(five, budget))
        drawn = laws.optimum(many, budget)
        (n_low, n_high), (d_low, d_high), (l_low, l_high) = (
            [float(x) for x in np.nanpercentile(d, [2.5, 97.5])] for d in drawn
        )
        given = {"flops": float(budget), "params": params, "tokens": tokens}
        said = validity(fit, given)[0]
        out.append(
            {
                "flops": float(budget),
                "params": params,
                "params_interval": [n_low, n_high],
                "tokens": tokens,
                "tokens_interval": [d_low, d_high],
                "tokens_per_param": tokens / params,
                "loss": value,
                "loss_interval": [l_low, l_high],
                "validity": said,
                "accuracy": accuracies(fit, value, [l_low, l_high], said),
            }
        )
    return out


def of_config(fit: record.Fit, experiment: configs.Experiment, tokens: float) -> dict[str, Any]:
    """The loss of a configuration after `tokens`, as `loss` says it.

    Its size is training FLOPs per token over 6, so that C = 6 N D is what is counted; `expansion`
    follows from the model where the law takes it.
    Errors: ValueError when the vocabulary is not filled in, or the law needs what no model says.
    """
    model, seq = experiment.model, experiment.data.seq
    if not model.vocab:
        raise ValueError("config.model.vocab: 0 until the data is known; a forecast needs it")
    size = flops.train_flops_per_token(model, seq, experiment.tokens_per_step).model / 6
    given = {"params": size, "tokens": float(tokens)}
    if fit.kind == "joint":
        counts = flops.parameters(model)
        given["expansion"] = counts.total / counts.active
    if fit.kind == "sparse_attention":
        raise ValueError("keys: what this model reads a token is not known; give it to `loss`")
    return loss(fit, **given) | given


def cost(rows: Sequence[Mapping[str, Any]], params: float, tokens: float) -> dict[str, Any]:
    """Seconds of training, CPU seconds and bytes at the peak of a run like the finished `rows`.

    log seconds is fitted to log params and log tokens, log memory to log params, each with the
    95 % Student interval of a further run; seconds hold for the machine and the load of the rows,
    CPU seconds (where all rows have them) for the machine.
    Errors: ValueError below five rows.
    """
    if len(rows) < 5:
        raise ValueError(f"rows: a forecast of cost takes 5 finished runs, got {len(rows)}")
    column = lambda key: np.log([float(row[key]) for row in rows])  # noqa: E731
    one = np.ones(len(rows))
    size, length = column("params"), column("tokens")
    at = np.array([1.0, np.log(params), np.log(tokens)])
    work = np.column_stack([one, size, length])
    said: dict[str, Any] = {}
    for name in ("seconds", "cpu_seconds", "memory"):
        if name == "cpu_seconds" and not all(row.get(name) for row in rows):
            continue
        x, place = (work[:, :2], at[:2]) if name == "memory" else (work, at)
        said[name], *interval = _further(x, column(name), place)
        said[f"{name}_interval"] = interval
    return said


def _further(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of a further observation of a log-linear law."""
    from scipy.special import stdtrit

    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    free = len(y) - x.shape[1]
    variance = float(((y - x @ weights) ** 2).sum() / free)
    spread = variance * (1 + at @ np.linalg.pinv(x.T @ x) @ at)
    half = float(stdtrit(free, 0.975)) * spread**0.5
    middle = float(at @ weights)
    return float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half))


def read(where: Path | str) -> record.Fit:
    """The fit of a file, of a folder that holds fit.json, or a shipped one by name.

    Errors: ValueError as record.read, naming the fits that ship.
    """
    shipped = {path.stem: path for path in SHIPPED.glob("*.json")}
    path = Path(where).expanduser()
    if path.is_dir():
        return record.read(path / "fit.json")
    if not path.exists() and str(where) in shipped:
        return record.read(shipped[str(where)])
    if not path.exists():
        raise ValueError(f"fit: there is no file {path}; fits that ship: {', '.join(shipped)}")
    return record.read(path)
