"""The k best experts of a token, against a stable sort in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.planning import hlo
from sparse_pretrain.routing import base
from sparse_pretrain.sharding import apply, mesh, plans


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


def test_tokens_choose_on_the_devices_that_have_them():
    """The partitioner would gather all scores for a sort."""
    plan = plans.find("fsdp_ep_cp")
    placed = apply.Placed(plan, mesh.make(plan, "fsdp=2,expert=2,context=2"))
    where = placed.named(placed.spec("BL.", (8, 16, 32)))
    like = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32, sharding=where)

    def best(score_TxE):
        return jax.lax.top_k(score_TxE, 2)[1]

    def apart(score):
        return base.per_token(best, (8, 16), score.reshape(-1, 32)).reshape(8, 16, 2)

    def together(score):
        return best(score.reshape(-1, 32)).reshape(8, 16, 2)

    def sent(call):
        made = placed.jit(call, out_shardings=where).lower(like).compile()
        return hlo.count(made.as_text()).collectives, made

    collectives, made = sent(apart)
    assert collectives == {}
    assert sent(together)[0], "nothing to guard against: the partitioner does it alone by now"
    score = np.random.default_rng(0).normal(size=like.shape).astype(np.float32)
    found = made(jax.device_put(score, where))
    np.testing.assert_array_equal(found, np.argsort(-score, axis=-1)[:, :, :2])
