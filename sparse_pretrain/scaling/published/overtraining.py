"""Claim B4: five small runs forecast a model trained 32 times longer, and one 650 times larger."""

import itertools
from typing import Any

import numpy as np

from sparse_pretrain.scaling.published import files

PUBLISHED = {"open_lm_1b": 0.7103, "open_lm_7b": 0.7320}  # percent of the loss
SMALL = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
FITTED = (*((name, 1.0) for name in SMALL), (SMALL[0], 16.0))
FORECAST = (("open_lm_1b", 32.0), ("open_lm_7b", 1.0))
DATASET, VALIDATION = "rpj", "c4_val"
TOKENS_PER_PARAM = 20.0  # at the file's multiplier 1


def refit() -> dict[str, Any]:
    """The law's constants, and by forecast run its loss, the forecast and the error in percent.

    L = E + (a M^eta + b M^-eta) C^-eta, with C = 6 N D and M tokens per parameter: linear in E, a
    and b, so that only eta is searched.
    Errors: files.Absent. Source: Gadre et al. (2403.08540), equation 4 and section 4.
    """
    runs = {
        (row["model"], float(row["chinchilla_multiplier"])): row
        for row in files.rows("published/overtraining/runs.csv")
        if row["dataset"] == DATASET and row["validation"] == VALIDATION
    }
    flops, ratio, loss = _columns([runs[key] for key in FITTED])
    eta, weights, rest = solve(flops, ratio, loss)
    flops, ratio, loss = _columns([runs[key] for key in FORECAST])
    forecast = _design(flops, ratio, eta) @ weights
    return {
        "E": float(weights[0]),
        "a": float(weights[1]),
        "b": float(weights[2]),
        "eta": eta,
        "residual": rest,
        "forecast": {
            name: {
                "loss": float(loss[i]),
                "forecast": float(forecast[i]),
                "error_percent": float(100 * abs(forecast[i] - loss[i]) / loss[i]),
            }
            for i, (name, _) in enumerate(FORECAST)
        },
    }


def solve(
    flops: np.ndarray, ratio: np.ndarray, loss: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """(eta, [E, a, b], root mean square of the residuals) of the least squares fit."""
    from scipy import optimize

    def rest(eta):
        x = _design(flops, ratio, eta)
        scale = np.abs(x).max(0)
        weights = np.linalg.lstsq(x / scale, loss, rcond=None)[0] / scale
        return x @ weights - loss, weights

    square = lambda eta: float((rest(eta)[0] ** 2).sum())  # noqa: E731
    edges = np.linspace(0.02, 0.62, 13)
    found = [
        optimize.minimize_scalar(square, bounds=pair, method="bounded", options={"xatol": 1e-12})
        for pair in itertools.pairwise(edges)
    ]
    best = min(found, key=lambda f: f.fun)
    return float(best.x), rest(best.x)[1], float(np.sqrt(best.fun / len(loss)))


def _columns(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    number = lambda key: np.array([float(row[key]) for row in rows])  # noqa: E731
    flops = 6 * number("params") * number("tokens")
    return flops, TOKENS_PER_PARAM * number("chinchilla_multiplier"), number("loss")


def _design(flops: np.ndarray, ratio: np.ndarray, eta: float) -> np.ndarray:
    return np.stack([np.ones_like(flops), ratio**eta * flops**-eta, (ratio * flops) ** -eta], 1)
