"""Loss curves of domains while a run goes on, and the scaling laws fitted to them.

A curve is an array [P, W] with W = 1 + 2 K: per point the targets read by then over all K domains,
the nats of each domain and its targets.
"""

import numpy as np
from jaxtyping import Float64

POINTS = 128  # kept of a curve; above it neighbours are merged
EXPONENTS = np.linspace(0.02, 1.0, 99)  # tried for the law n^-a


def law(
    n_P: Float64[np.ndarray, " P"], loss_P: Float64[np.ndarray, " P"],
    count_P: Float64[np.ndarray, " P"],
) -> tuple[float, float, float]:  # fmt: skip
    """(E, B, a) of the law E + B n^-a nearest to a curve, E and B not negative.

    Least squares weighted by `count`: for each exponent of a grid E and B are linear and solved
    exactly; the best exponent is taken.
    """
    x_AxP = (n_P[None, :] / n_P.max()) ** -EXPONENTS[:, None]
    share = count_P / count_P.sum()
    mean_x, mean_y = x_AxP @ share, loss_P @ share
    spread = np.square(x_AxP - mean_x[:, None]) @ share
    slope = ((x_AxP - mean_x[:, None]) * (loss_P - mean_y)) @ share / np.maximum(spread, 1e-30)
    # where the floor would be below 0 it is 0, and B alone is fitted; a rising curve is flat
    through = (x_AxP * loss_P) @ share / (np.square(x_AxP) @ share)
    slope = np.where(slope * mean_x > mean_y, through, np.maximum(slope, 0.0))
    floor = np.maximum(mean_y - slope * mean_x, 0.0)
    error = np.square(floor[:, None] + slope[:, None] * x_AxP - loss_P) @ share
    best = int(np.argmin(error))
    a = float(EXPONENTS[best])
    return float(floor[best]), float(slope[best] * n_P.max() ** a), a


def speeds(curve: Float64[np.ndarray, "P W"]) -> Float64[np.ndarray, " K"]:
    """a (L - E) of every domain's law at the curve's end; without a curve the mean of others."""
    K = curve.shape[1] // 2
    found = np.full(K, np.nan)
    for k in range(K):
        nats, count = curve[:, 1 + k], curve[:, 1 + K + k]
        held = count > 0
        if held.sum() >= 3:
            n = curve[held, 0]
            _, b, a = law(n, nats[held] / count[held], count[held])
            found[k] = a * b * float(curve[-1, 0]) ** -a
    return np.where(np.isnan(found), np.nanmean(found) if np.isfinite(found).any() else 0.0, found)


def merged(curve: Float64[np.ndarray, "P W"]) -> Float64[np.ndarray, "Q W"]:
    """The curve, pairs of neighbours as one point where it has grown past POINTS."""
    if len(curve) <= POINTS:
        return curve
    even = curve[: len(curve) // 2 * 2].reshape(-1, 2, curve.shape[1])
    pairs = np.concatenate([even[:, :, :1].mean(1), even[:, :, 1:].sum(1)], axis=1)
    return np.concatenate([pairs, curve[len(even) * 2 :]])
