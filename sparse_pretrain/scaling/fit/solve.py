"""The minimum of an Objective from many starts, by scipy, polished to the last digits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.scaling.fit import law

SCREENED = 64  # starts that are followed; a test holds the result to following all


class Found(NamedTuple):
    """`theta` at the minimum, the objective there, and the norm of its gradient."""

    theta: np.ndarray
    loss: float
    gradient: float


def minimise(
    objective: law.Objective,
    starts: Float64[np.ndarray, "starts parameters"],
    *,
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
    follow: int = SCREENED,
) -> Found:
    """The lowest minimum reached by L-BFGS from the `follow` best of `starts`, then polished.

    The best starts are the lowest of each tenth of the grid by turns, so that one basin does not
    take all places. The Huber loss has kinks in its second derivative, where L-BFGS stalls at five
    or six digits; a trust-region Newton method goes on from the best of them.
    Units: `bounds` per parameter, None for free; without bounds the polish is unconstrained.
    """
    from scipy import optimize  # half a second, which --help does not wait for

    found = []
    scale = 1 / objective.delta  # makes the objective of order one, where tolerances mean something
    fun = lambda t: tuple(scale * x for x in objective.loss_and_gradient(t))  # noqa: E731
    for start in _screen(objective, starts, follow):
        done = optimize.minimize(
            fun,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20},
        )
        found.append((done.fun, done.x))
    found.sort(key=lambda pair: pair[0])
    best = min((polish(objective, x, bounds) for _, x in found[:3]), key=lambda f: f.loss)
    return best


def _screen(objective: law.Objective, starts: np.ndarray, follow: int) -> np.ndarray:
    if len(starts) <= follow:
        return starts
    loss = np.concatenate([objective.loss(part) for part in np.array_split(starts, 16)])
    parts = [part[np.argsort(loss[part])] for part in np.array_split(np.arange(len(starts)), 10)]
    best = np.argsort(loss)[: follow // 2]
    spread = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    return starts[list(dict.fromkeys([*best, *spread]))[:follow]]


def polish(objective: law.Objective, theta: np.ndarray, bounds=None) -> Found:
    """From near a minimum to it: Newton steps in a trust region, in scaled parameters.

    A parameter at its bound stays there.
    """
    from scipy import optimize

    theta = np.array(theta, np.float64)
    free = np.ones(len(theta), bool)
    if bounds is not None:
        for i, (low, high) in enumerate(bounds):
            free[i] = (low is None or theta[i] > low) and (high is None or theta[i] < high)
    scale = 1 / objective.delta

    def whole(part):
        full = theta.copy()
        full[free] = part
        return full

    def fun(part):
        loss, gradient = objective.loss_and_gradient(whole(part))
        return scale * loss, scale * gradient[free]

    def hess(part):
        return scale * objective.hessian(whole(part))[np.ix_(free, free)]

    start = theta[free]
    done = optimize.minimize(
        fun,
        start,
        jac=True,
        hess=hess,
        method="trust-exact",
        options={"gtol": 1e-12, "maxiter": 200, "initial_trust_radius": 0.1},
    )
    part = done.x if done.fun <= fun(start)[0] else start
    if bounds is not None:  # the polish left the box: what L-BFGS found stands
        low = np.array([-np.inf if b[0] is None else b[0] for b in bounds])[free]
        high = np.array([np.inf if b[1] is None else b[1] for b in bounds])[free]
        if (part < low).any() or (part > high).any():
            part = start
    loss, gradient = objective.loss_and_gradient(whole(part))
    return Found(whole(part), loss, float(np.linalg.norm(gradient[free])))
