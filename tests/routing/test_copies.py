"""Copies of experts against loops in numpy: slots, turns, and one gradient for all copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

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


def cut(function, devices, *arrays):
    """`function(part, whole.., axes=("expert",))` of each device's run of the first array."""
    if devices == 1:
        return jax.jit(lambda *a: function(*a, axes=()))(*arrays)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("expert",))
    specs = P("expert"), *(P() for _ in arrays[1:])
    run = functools.partial(function, axes=("expert",))
    parts = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)
    return jax.jit(parts)(*arrays)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("held", MAPS)
def test_the_gradient_of_a_slot_is_the_sum_over_its_experts_copies(held, devices, rng):
    dw = rng.normal(size=(len(held), 3, 5)).astype(np.float32)
    numbers = jnp.asarray(held, jnp.int32)
    got = np.asarray(cut(functools.partial(copies.total, experts=4), devices, dw, numbers))
    for r, e in enumerate(held):
        same = [s for s, h in enumerate(held) if h == e]
        np.testing.assert_allclose(got[r], dw[same].sum(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[r], got[same[0]])  # to the bit, or copies drift apart
    one_each = [held.index(e) for e in range(4)]
    norm = copies.square_norm(jnp.asarray(got), numbers)
    np.testing.assert_allclose(norm, np.square(got[one_each]).sum(), rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_every_slot_takes_what_its_source_held(devices, rng):
    w = rng.normal(size=(8, 3, 5)).astype(np.float32)
    for source in (rng.integers(0, 8, 8), np.arange(8), np.zeros(8, int)):
        got = cut(copies.moved, devices, w, jnp.asarray(source, jnp.int32))
        np.testing.assert_array_equal(got, w[source])
