"""Many fits of one law at once, from one start: what a bootstrap needs a thousand of."""

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.scaling.fit import law

ROUNDS = 200


def minimise(
    features: law.Terms,
    targets_BxR: np.ndarray,
    weights_BxR: np.ndarray,
    start: law.Theta,
    *,
    delta: float = law.DELTA,
    rounds: int = ROUNDS,
) -> Float64[np.ndarray, "problems parameters"]:
    """The parameters of every problem's Huber fit, by reweighted and damped least squares.

    A problem has its own targets and weights and shares the runs. Shapes: B problems, R runs.
    Source: reweighting as in Huber, "Robust Statistics" (1981), 7.8; damping as in Marquardt,
    SIAM J. Appl. Math. 11 (1963).
    """
    problems, parameters = len(targets_BxR), features.shape[-1]
    theta = np.tile(start, (problems, 1)).astype(np.float64)
    damping = np.full(problems, 1e-3)
    loss = _loss(features, theta, targets_BxR, weights_BxR, delta)
    active = np.ones(problems, bool)
    for _ in range(rounds):
        at = np.flatnonzero(active)
        if not at.size:
            break
        rest, slope = _slopes(features, theta[at], targets_BxR[at])
        pull = weights_BxR[at] / np.maximum(np.abs(rest) / delta, 1.0)
        gradient = np.einsum("brp,br->bp", slope, pull * rest)
        bend = np.einsum("brp,brq->bpq", slope * pull[..., None], slope)
        diagonal = np.einsum("bpp->bp", bend)
        ridge = damping[at, None] * diagonal + 1e-14 * diagonal.max(1, keepdims=True) + 1e-300
        bend = bend + ridge[..., None] * np.eye(parameters)
        step = np.linalg.solve(bend, gradient[..., None])[..., 0]
        fresh = theta[at] - step
        new = _loss(features, fresh, targets_BxR[at], weights_BxR[at], delta)
        better = new < loss[at]
        gain = np.where(better, loss[at] - new, 0.0)
        theta[at[better]], loss[at[better]] = fresh[better], new[better]
        damping[at] = np.where(better, damping[at] / 4, damping[at] * 8)
        settled = (better & (gain < 1e-10 * loss[at])) | (damping[at] > 1e6)
        active[at[settled]] = False
    return theta


def _loss(features, theta, targets, weights, delta):
    size = np.abs(law.values(features, theta) - targets)
    inner = np.minimum(size, delta)
    return (weights * inner * (size - inner / 2)).sum(-1)


def _slopes(features, theta_BxP, targets):
    z = np.stack([theta_BxP @ f.T for f in features])
    top = z.max(0)
    share = np.exp(z - top)
    total = share.sum(0)
    value = top + np.log(total)
    return value - targets, np.einsum("kbr,krp->brp", share / total, features)
