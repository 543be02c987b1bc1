"""The minimum of an Objective from many starts, by scipy, polished to the last digits."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.scaling.fit import law

SCREENED = 64  # starts that are followed; a test holds the result to following others
COARSE = {"maxiter": 200, "ftol": 1e-7, "gtol": 1e-6}
FINE = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}


class Found(NamedTuple):
    """`theta` at the minimum, the objective there, and the norm of its gradient."""

    theta: np.ndarray
    loss: float
    gradient: float


def minimise(
    objective: law.Objective,
    starts: Float64[np.ndarray, "starts parameters"],
    *,
    follow: int = SCREENED,
) -> Found:
    """The lowest minimum reached by L-BFGS from the `follow` best of `starts`, then polished.

    The best starts are the lowest of all and the lowest of each tenth of the grid by turns, so that
    one basin does not take all places. All are followed coarsely and the best three to the end. The
    Huber loss has kinks in its second derivative, where L-BFGS stalls at five or six digits; a
    trust-region Newton method goes on from there.
    """
    coarse = [_descend(objective, start, COARSE) for start in _screen(objective, starts, follow)]
    coarse.sort(key=lambda pair: pair[0])
    fine = [_descend(objective, theta, FINE)[1] for _, theta in coarse[:3]]
    return min((polish(objective, theta) for theta in fine), key=lambda found: found.loss)


def _descend(
    objective: law.Objective, start: np.ndarray, options: dict
) -> tuple[float, np.ndarray]:
    from scipy import optimize  # half a second, which --help does not wait for

    scale = 1 / objective.delta  # makes the objective of order one, where tolerances mean something

    def fun(theta):
        loss, gradient = objective.loss_and_gradient(theta)
        return scale * loss, scale * gradient

    done = optimize.minimize(fun, start, jac=True, method="L-BFGS-B", options=options)
    return float(done.fun), done.x


def _screen(objective: law.Objective, starts: np.ndarray, follow: int) -> np.ndarray:
    if len(starts) <= follow:
        return starts
    loss = np.concatenate([objective.loss(part) for part in np.array_split(starts, 16)])
    parts = [part[np.argsort(loss[part])] for part in np.array_split(np.arange(len(starts)), 10)]
    best = np.argsort(loss)[: follow // 2]
    spread = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    return starts[list(dict.fromkeys([*best, *spread]))[:follow]]


def polish(objective: law.Objective, theta: np.ndarray) -> Found:
    """From near a minimum to it: Newton steps in a trust region."""
    from scipy import optimize

    scale = 1 / objective.delta

    def fun(t):
        loss, gradient = objective.loss_and_gradient(t)
        return scale * loss, scale * gradient

    done = optimize.minimize(
        fun,
        theta,
        jac=True,
        hess=lambda t: scale * objective.hessian(t),
        method="trust-exact",
        options={"gtol": 1e-12, "maxiter": 200, "initial_trust_radius": 0.1},
    )
    best = done.x if done.fun <= fun(theta)[0] else theta
    loss, gradient = objective.loss_and_gradient(best)
    return Found(best, loss, float(np.linalg.norm(gradient)))
