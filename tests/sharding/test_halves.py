"""A backward pass in two halves gives what it gives whole, and keeps what products need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.sharding.halves import halves

B, D, F = 6, 4, 8


def layer(p, x):
    """A norm's gain, a gated layer under remat, a loop that gives two gradients at once."""
    h = x * p["gain"]

    @jax.checkpoint
    def gated(h):
        return jax.nn.silu(h @ p["gate"]) * jax.jit(jnp.matmul)(h, p["up"])

    def again(h, _):
        return jnp.tanh(h @ p["loop"]), None

    return x + gated(h) @ p["down"] + jax.lax.scan(again, h, length=3)[0]


@pytest.fixture
def made():
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = dict(gate=(D, F), up=(D, F), down=(F, D), loop=(D, D))
    p = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    p["gain"] = jnp.ones((B, D))
    x, dy = (jax.random.normal(k, (B, D)) for k in keys[-2:])
    _, pull = jax.vjp(layer, p, x)
    leaves, tree = jax.tree.flatten(pull)

    def back(*inputs):
        dp, dx = jax.tree.unflatten(tree, inputs[:-1])(inputs[-1])
        return [*jax.tree.leaves(dp), dx]

    return p, back, [*leaves, dy]


def test_the_halves_give_what_the_whole_gives(made):
    p, back, inputs = made
    found = halves(back, inputs, may_wait=[True] * 5 + [False])
    assert dict(zip([*sorted(p), "x"], found.waits, strict=True)) == dict(
        down=True, gain=False, gate=True, loop=False, up=True, x=False
    ), "a gradient waits where a product is left, and not where one loop gives two"
    now, kept = jax.jit(found.first)(*inputs)
    late = jax.jit(lambda *kept: found.second(*kept))(*kept)
    now, late = iter(now), iter(late)
    for w, want in zip(found.waits, jax.jit(back)(*inputs), strict=True):
        got = next(late) if w else next(now)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_what_is_kept_is_two_arrays_a_product_each_once(made):
    """The input of gate and up, their gradients, and the input of down and its gradient."""
    _, back, inputs = made
    found = halves(back, inputs, may_wait=[True] * 5 + [False])
    _, kept = found.first(*inputs)
    sizes = sorted(k.shape for k in kept)
    assert sizes == [(B, D), (B, D), (B, F), (B, F), (B, F)]


def test_the_first_half_has_no_product_of_the_second(made):
    """Of ten products outside the loop, three are for weights."""
    _, back, inputs = made
    found = halves(back, inputs, may_wait=[True] * 5 + [False])

    def products(function, *args):
        return str(jax.make_jaxpr(function)(*args)).count("dot_general")

    _, kept = found.first(*inputs)
    whole, first = products(back, *inputs), products(found.first, *inputs)
    assert products(lambda *kept: found.second(*kept), *kept) == 3
    assert first == whole - 3


def test_inputs_that_are_there_anyway_are_not_kept(made):
    _, back, inputs = made
    none = halves(back, inputs, may_wait=[True] * 5 + [False])
    there = [True] * len(inputs)
    found = halves(back, inputs, may_wait=[True] * 5 + [False], there=there)
    _, kept = found.first(*inputs)
    assert len(kept) + len(found.again) == len(none.first(*inputs)[1])
    assert found.again, "the gradient that comes in is needed again"
    got = found.second(*kept, *(inputs[i] for i in found.again))
    want = [g for g, w in zip(back(*inputs), found.waits, strict=True) if w]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_a_shard_map_is_parted_as_what_it_maps_is():
    """Two gradients of one map over rows, one of which is summed over devices and waits."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, every = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = ((4 * B, D), (D, F), (4 * B, F))
    x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))

    def mapped(x, w):
        return jax.shard_map(
            lambda x, w: jnp.tanh(x @ w), in_specs=(rows, every), out_specs=rows, check_vma=False
        )(x, w)

    def back(x, w, dy):
        dx, dw = jax.vjp(mapped, x, w)[1](dy)
        return [dw, dx]

    with jax.set_mesh(mesh):
        found = []

        def both(x, w, dy):
            found.append(halves(back, [x, w, dy], may_wait=[True, False]))
            now, kept = found[-1].first(x, w, dy)
            return found[-1].second(*kept) + now, kept

        got, kept = jax.jit(both)(x, w, dy)
        want = jax.jit(back)(x, w, dy)
    assert found[-1].waits == (True, False)
    assert sorted(k.shape for k in kept) == [(4, B, D), (4, B, F)], "of each device its own"
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_what_is_narrowed_is_kept_narrow():
    """A copy in float32 of something in bfloat16 is made again, not kept."""
    x, w, dy = jnp.ones((B, D), jnp.bfloat16), jnp.ones((D, F)), jnp.ones((B, F), jnp.bfloat16)

    def back(x, w, dy):
        wide = jnp.exp(dy).astype(jnp.float32)
        return [x.astype(jnp.float32).T @ wide, wide @ w.T]

    found = halves(back, [x, w, dy], may_wait=[True, False])
    assert found.waits == (True, False)
    assert {k.dtype for k in found.first(x, w, dy)[1]} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(
        found.second(*found.first(x, w, dy)[1])[0], back(x, w, dy)[0], rtol=1e-6
    )
