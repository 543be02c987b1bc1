"""Selective Sinkhorn: a share of the batches is balanced, the rest goes by score alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import nn
from sparse_pretrain.routing import base, market

WIDTH, EXPERTS, SEATS = 12, 8, 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_all_batches_is_drawn(share, rng):
    tokens = jnp.asarray(rng.integers(0, 50, (2000, 4, 8)))
    drawn = np.asarray(jax.vmap(lambda t: base.drawn(t, share))(tokens))
    sigma = np.sqrt(share * (1 - share) / 2000)
    assert abs(drawn.mean() - share) < 4 * sigma


def test_the_order_of_tokens_counts():
    # the same tokens in another order are another batch
    token = jnp.arange(64).reshape(4, 16)
    draws = {bool(base.drawn(jnp.roll(token.reshape(-1), i).reshape(4, 16), 0.5)) for i in range(9)}
    assert draws == {True, False}


def test_drawn_batches_are_balanced_and_others_go_by_score(rng):
    def router(share):
        config = market.Config(solver="sinkhorn", share=share, iterations=30)
        return nn.define(lambda keys: market.Market(config, WIDTH, EXPERTS, SEATS, keys))

    params, prices = router(0.5).init(jax.random.key(0))
    x = jnp.asarray(rng.normal(size=(4, 32, WIDTH)) + 0.7, jnp.float32)
    valid = np.ones((4, 32), bool)
    seen = set()
    for seed in range(12):
        tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 99, (4, 32)))
        got = router(0.5).merge(params, prices)(x, valid, tokens, train=True)
        drawn = bool(base.drawn(tokens, 0.5))
        seen.add(drawn)
        if drawn:
            whole = router(1.0).merge(params, prices)(x, valid, tokens, train=True)
            np.testing.assert_array_equal(got.expert, whole.expert)
        else:
            score = jax.nn.sigmoid(x.reshape(-1, WIDTH) @ params["w"])
            best = np.argsort(-np.asarray(score), axis=1)[:, :SEATS]
            np.testing.assert_array_equal(np.sort(got.expert, axis=1), np.sort(best, axis=1))
        assert not np.asarray(got.market["proposal"]).any()  # held-out text goes by score
    assert seen == {True, False}


def test_a_share_goes_with_sinkhorn_only():
    with pytest.raises(ValueError, match=r"share: 0\.5 goes with solver sinkhorn, not with bip"):
        market.Config(solver="bip", share=0.5)
