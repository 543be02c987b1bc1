"""The k best experts of a token, against a stable sort in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.routing import base


@pytest.mark.parametrize(("experts", "k"), [(16, 3), (64, 8), (5, 5), (7, 1)])
@pytest.mark.parametrize("scores", ["distinct", "ties", "closed"])
def test_order_and_ties(rng, experts, k, scores):
    z = rng.normal(size=(200, experts)).astype(np.float32)
    if scores != "distinct":
        z = np.round(z) + np.float32(0)  # no negative zeros
    if scores == "closed":  # experts out of reach, more of them than are left in some rows
        z[:, : experts // 2] = -np.inf
    expected = np.argsort(-z, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(base.top_k(jnp.asarray(z), k), expected)
