"""The laws of loss: what each is in parameters, and the columns it needs."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.scaling.fit import law

Columns = Mapping[str, np.ndarray]

# The grid of Hoffmann et al. (2203.15556), appendix D.3, as Besiroglu et al. (2404.10102) use it.
A_B, E_STARTS, EXPONENTS = np.arange(0, 26, 5.0), np.arange(-1, 1.1, 0.5), np.arange(0, 2.1, 0.5)
GRID = np.array(list(itertools.product(A_B, A_B, E_STARTS, EXPONENTS, EXPONENTS)))


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of loss.

    `parameters` are those of the optimizer (logarithms of factors lower case), `columns` what a
    run must say, `build(columns)` gives the features, `extend` what is put beside each start of the
    grid, and `formula` how people write it.
    """

    kind: str
    formula: str
    parameters: tuple[str, ...]
    columns: tuple[str, ...]
    build: Callable[[Columns], law.Terms]
    extend: tuple[tuple[float, ...], ...]
    source: str

    def starts(self) -> Float64[np.ndarray, "starts parameters"]:
        """Where the optimizer starts."""
        return np.concatenate([np.hstack([GRID, np.tile(x, (len(GRID), 1))]) for x in self.extend])

    def constants(self, theta: np.ndarray) -> dict[str, law.Real]:
        """The constants of the formula by name, of one or of many parameter vectors."""
        found = dict(zip(self.parameters, np.moveaxis(theta, -1, 0), strict=True))
        factors = {k.upper(): np.exp(v) for k, v in found.items() if len(k) == 1}
        return factors | {k: v for k, v in found.items() if len(k) > 1}


def _rows(size: int, *columns: tuple[int, np.ndarray | float], like: np.ndarray) -> np.ndarray:
    """One term's features: the given columns, zero elsewhere."""
    out = np.zeros((len(like), size))
    for at, value in columns:
        out[:, at] = value
    return out


def _chinchilla(columns: Columns) -> np.ndarray:
    n, d = np.log(columns["params"]), np.log(columns["tokens"])
    return np.stack(
        [
            _rows(5, (0, 1.0), (3, -n), like=n),
            _rows(5, (1, 1.0), (4, -d), like=n),
            _rows(5, (2, 1.0), like=n),
        ]
    )


def _joint(columns: Columns) -> np.ndarray:
    n, d, x = (np.log(columns[k]) for k in ("params", "tokens", "expansion"))
    return np.stack(
        [
            _rows(7, (0, 1.0), (3, -n), (5, -x), like=n),
            _rows(7, (1, 1.0), (4, -d), (6, -x), like=n),
            _rows(7, (2, 1.0), like=n),
        ]
    )


def _sparse_attention(columns: Columns) -> np.ndarray:
    n, d, k = (np.log(columns[k]) for k in ("params", "tokens", "keys"))
    return np.stack(
        [
            _rows(7, (0, 1.0), (3, -n), like=n),
            _rows(7, (1, 1.0), (4, -d), like=n),
            _rows(7, (2, 1.0), like=n),
            _rows(7, (5, 1.0), (6, -k), like=n),
        ]
    )


FIVE = ("a", "b", "e", "alpha", "beta")
TABLE = {
    found.kind: found
    for found in (
        Law(
            "chinchilla",
            "L = E + A / N^alpha + B / D^beta",
            FIVE,
            ("params", "tokens"),
            _chinchilla,
            ((),),
            "Hoffmann et al. (2203.15556), approach 3; Besiroglu et al. (2404.10102)",
        ),
        Law(
            "joint",
            "L = E + A / (N^alpha X^delta) + B / (D^beta X^omega), X all over active parameters",
            (*FIVE, "delta", "omega"),
            ("params", "tokens", "expansion"),
            _joint,
            ((0.0, 0.0), (0.1, 0.1)),
            "Ludziejewski et al. (2502.05172), without its terms ln N ln X and ln D ln X",
        ),
        Law(
            "sparse_attention",
            "L = E + A / N^alpha + B / D^beta + G / keys^kappa, keys read by a token",
            (*FIVE, "g", "kappa"),
            ("params", "tokens", "keys"),
            _sparse_attention,
            ((-2.0, 0.5), (0.0, 1.0)),
            "none: a power law in the keys, added as the other terms are",
        ),
    )
}


def find(kind: str) -> Law:
    """The law of this name. Errors: ValueError naming those there are."""
    if kind not in TABLE:
        raise ValueError(f"law: {kind!r} is not one of {', '.join(TABLE)}")
    return TABLE[kind]


def dense(theta: np.ndarray, kind: str, expansion: float = 1.0) -> np.ndarray:
    """The five parameters of the Chinchilla law that a law is at one expansion, [..., 5].

    Errors: ValueError for a law that has another term.
    """
    five = np.array(theta[..., :5])
    if kind == "joint":
        five[..., 0] -= theta[..., 5] * np.log(expansion)
        five[..., 1] -= theta[..., 6] * np.log(expansion)
    elif kind != "chinchilla":
        raise ValueError(f"law: {kind!r} has no optimal split of compute into N and D alone")
    return five


def optimum(five: np.ndarray, flops: float) -> tuple[law.Real, law.Real, law.Real]:
    """(params, tokens, loss) where the law is least at C = 6 N D.

    Source: Hoffmann et al. (2203.15556), equation 4.
    """
    a, b, e, alpha, beta = np.moveaxis(five, -1, 0)
    with np.errstate(all="ignore"):  # a refit without a minimum gives NaN or infinity
        log_g = (np.log(alpha) + a - np.log(beta) - b) / (alpha + beta)
        log_n = log_g + beta / (alpha + beta) * np.log(flops / 6)
        log_d = np.log(flops / 6) - log_n
        loss = np.exp(e) + np.exp(a - alpha * log_n) + np.exp(b - beta * log_d)
        return np.exp(log_n), np.exp(log_d), loss
