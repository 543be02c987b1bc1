"""Laws whose logarithm is a log-sum-exp of terms linear in the parameters, and their robust loss.

Every law here is of this form: E + A/N^alpha + B/D^beta has the terms e, a - alpha log N and
b - beta log D. One set of exact derivatives then serves them all.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float64

DELTA = 1e-3  # of the Huber loss on log loss: Hoffmann et al. (2203.15556), appendix D.3
Terms = Float64[np.ndarray, "terms runs parameters"]
Theta = Float64[np.ndarray, " parameters"]
Real = np.ndarray | np.floating  # numpy gives a scalar for one parameter vector
Runs = Float64[np.ndarray, " runs"]


def values(features: Terms, theta: Float64[np.ndarray, "*batch parameters"]) -> np.ndarray:
    """log of the law at each run, [*batch, runs]."""
    z = _terms(features, theta)
    top = z.max(0)
    return top + np.log(np.exp(z - top).sum(0))


def _terms(features, theta):
    """Each term's exponent, [terms, *batch, runs]."""
    return np.stack([theta @ f.T for f in features])


def slopes(features, theta):
    """(log of the law [runs], its gradient [runs, parameters], each term's share [terms, runs]).

    Not annotated, as an optimizer calls it thousands of times and tests check every annotation.
    """
    z = _terms(features, theta)
    top = z.max(0)
    share = np.exp(z - top)
    total = share.sum(0)
    share /= total
    return top + np.log(total), np.einsum("kr,krp->rp", share, features), share


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """Sum over runs of weight x Huber(log of the law - log of the measured loss).

    Shapes: features [terms, runs, parameters]; target, weight [runs].
    Differs: the SUM, as in the published fit; a mean stops an optimizer early (2404.10102, 2).
    """

    features: Terms
    target: Runs
    weight: Runs
    delta: float = DELTA

    @functools.cached_property
    def _pairs(self) -> np.ndarray:
        """Products of each term's features, [terms, runs, parameters^2]."""
        f = self.features
        return (f[..., :, None] * f[..., None, :]).reshape(*f.shape[:2], -1)

    def loss(self, theta: Float64[np.ndarray, "*batch parameters"]) -> Real:
        """The objective at each of a batch of parameters."""
        size = np.abs(values(self.features, theta) - self.target)
        inner = np.minimum(size, self.delta)
        return (self.weight * inner * (size - inner / 2)).sum(-1)

    def loss_and_gradient(self, theta):
        """For scipy's optimizers."""
        value, slope, _ = slopes(self.features, theta)
        rest = value - self.target
        pull = np.clip(rest, -self.delta, self.delta)
        loss = (self.weight * (np.abs(pull) * (np.abs(rest) - np.abs(pull) / 2))).sum()
        return float(loss), slope.T @ (self.weight * pull)

    def hessian(self, theta: Theta) -> Float64[np.ndarray, "p p"]:
        """Second derivatives: exact away from the two kinks of each Huber term."""
        value, slope, share = slopes(self.features, theta)
        rest = value - self.target
        pull = self.weight * np.clip(rest, -self.delta, self.delta)
        bend = np.einsum("kr,krq->q", share * pull, self._pairs).reshape(2 * slope.shape[1:])
        inside = self.weight * (np.abs(rest) <= self.delta) - pull
        return bend + (slope * inside[:, None]).T @ slope
