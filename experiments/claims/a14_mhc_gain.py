"""A14: Residual mixing that is kept doubly stochastic neither grows nor shrinks a signal.

Source: 2512.24880, figures 3 and 7.
Published: composite gain at most about 1.6 over all layers, against about 3,000 unconstrained.
Kind: EXACT.
Tested: products of 60 matrices 4 x 4 of standard normal logits, put through the released code's
    softmax and 20 Sinkhorn normalisations, and used as they are; the largest sum of magnitudes of
    a row or a column of any partial product, worst of 32 draws.
Criterion: at most 1.05 against more than 5.
Cost: under a second.
Result: PASS at d4dca4e: 1.0001 against 1.7e+18.
"""

import numpy as np

from sparse_pretrain.claims import base

STREAMS, LAYERS, DRAWS, ROUNDS, EPS = 4, 60, 32, 20, 1e-6


def doubly_stochastic(logits):
    """The released mixing: a softmax of rows, then columns and rows in turn. [..., n, n]."""
    b = np.exp(logits - logits.max(-1, keepdims=True))
    b = b / b.sum(-1, keepdims=True) + EPS
    b = b / (b.sum(-2, keepdims=True) + EPS)
    for _ in range(ROUNDS - 1):
        b = b / (b.sum(-1, keepdims=True) + EPS)
        b = b / (b.sum(-2, keepdims=True) + EPS)
    return b


def gain(matrices):
    """The largest row or column sum of magnitudes of any partial product. [draws, layers, n, n]."""
    product = np.eye(STREAMS)[None].repeat(len(matrices), 0)
    worst = 0.0
    for n in range(matrices.shape[1]):
        product = matrices[:, n] @ product
        size = np.abs(product)
        worst = max(worst, float(size.sum(-1).max()), float(size.sum(-2).max()))
    return worst


def measure(bench):
    """Both gains."""
    del bench
    logits = np.random.default_rng(0).normal(size=(DRAWS, LAYERS, STREAMS, STREAMS))
    kept, free = gain(doubly_stochastic(logits)), gain(logits)
    return base.Outcome(
        passed=kept <= 1.05 and free > 5,
        measured=f"{kept:.4f} against {free:.1e}",
        numbers={"kept": kept, "free": free},
    )
