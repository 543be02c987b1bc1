"""Markets to test on, and their optima from linear programming and the assignment problem."""

import numpy as np
import scipy.optimize
import scipy.sparse


def scores(kind, tokens, experts, seed=0):
    """float32 scores [tokens, experts] of one of the kinds in KINDS."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        s = rng.normal(size=(tokens, experts))
    elif kind == "ties":
        s = rng.integers(0, 3, (tokens, experts)) / 2
    elif kind == "one dominant expert":
        s = rng.normal(size=(tokens, experts))
        s[:, 3] += 6
    elif kind == "all equal":
        s = np.ones((tokens, experts))
    elif kind == "skewed":
        s = rng.normal(size=(tokens, experts)) - 1.5 * np.log(1 + np.arange(experts))
    elif kind == "clustered":  # few kinds of token, alike to many digits: steps can stall
        centres = rng.normal(size=(4, experts))
        s = centres[rng.integers(0, 4, tokens)] + 1e-3 * rng.normal(size=(tokens, experts))
    else:
        raise KeyError(kind)
    return s.astype(np.float32)


KINDS = ("random", "ties", "one dominant expert", "all equal", "skewed", "clustered")


def linear_program(s, k, capacity):
    """(best total score, prices [E]): max sum s x, k experts a token, at most `capacity` each."""
    T, E = s.shape
    rows = scipy.sparse.kron(scipy.sparse.eye(T), np.ones((1, E)))
    columns = scipy.sparse.kron(np.ones((1, T)), scipy.sparse.eye(E))
    got = scipy.optimize.linprog(
        -s.astype(np.float64).ravel(),
        A_eq=rows,
        b_eq=np.full(T, k),
        A_ub=columns,
        b_ub=np.full(E, capacity),
        bounds=(0, 1),
        method="highs",
    )
    assert got.status == 0, got.message
    return -got.fun, -got.ineqlin.marginals


def best_assignment(s, capacity):
    """Best total score for k = 1, from the assignment problem over identical seats."""
    seats = np.repeat(s.astype(np.float64), capacity, axis=1)
    rows, columns = scipy.optimize.linear_sum_assignment(seats, maximize=True)
    return seats[rows, columns].sum()


def dual(s, price, k):
    """The dual objective, summed over tokens, with m k / n seats an expert; float64."""
    s, price = np.asarray(s, np.float64), np.asarray(price, np.float64)
    best = np.sort(s - price, axis=1)[:, -k:].sum()
    return best + price.sum() * s.shape[0] * k / s.shape[1]


def loads(s, price, k):
    """Tokens that each expert gets when every token buys its k best."""
    chosen = np.argsort(-(np.asarray(s) - np.asarray(price)), axis=1, kind="stable")[:, :k]
    return np.bincount(chosen.ravel(), minlength=s.shape[1])
