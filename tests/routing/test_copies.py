"""Copies of experts against loops in numpy: slots, turns, and one gradient for all copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.routing import copies

MAPS = [[0, 1, 2, 3], [3, 0, 1, 2, 3, 3], [2, 2, 1, 0, 3, 2, 1, 2]]


@pytest.mark.parametrize("held", MAPS)
def test_every_pair_goes_to_a_slot_of_its_expert_in_turn(held, rng):
    expert = rng.integers(0, 5, (40, 2))  # 4 is no expert
    found = copies.slots(jnp.asarray(held, jnp.int32), 4)
    slot = np.asarray(copies.choose(jnp.asarray(expert, jnp.int32), found))
    for t, row in enumerate(expert):
        for e, s in zip(row, slot[t], strict=True):
            mine = [r for r, h in enumerate(held) if h == e]
            assert s == (mine[t % len(mine)] if mine else len(held))
    np.testing.assert_array_equal(found.held, np.bincount(held, minlength=4))


@pytest.mark.parametrize("held", MAPS)
def test_the_gradient_of_a_slot_is_the_sum_over_its_experts_copies(held, rng):
    found = copies.slots(jnp.asarray(held, jnp.int32), 4)
    w, dy = (jnp.asarray(rng.normal(size=(len(held), 3, 5)), jnp.float32) for _ in range(2))
    y, pull = jax.vjp(lambda w: copies.tie(w, found), w)
    np.testing.assert_array_equal(y, w)
    got = np.asarray(pull(dy)[0])
    for r, e in enumerate(held):
        same = [s for s, h in enumerate(held) if h == e]
        np.testing.assert_allclose(got[r], np.asarray(dy)[same].sum(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[r], got[same[0]])  # to the bit, or copies drift apart
    one_each = [held.index(e) for e in range(4)]
    norm = copies.square_norm(jnp.asarray(got), jnp.asarray(held, jnp.int32))
    np.testing.assert_allclose(norm, np.square(got[one_each]).sum(), rtol=1e-5)
