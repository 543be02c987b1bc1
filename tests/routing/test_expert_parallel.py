"""Experts over 8 simulated devices against one: a numpy loop in float64, whatever the load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from sparse_pretrain.routing import expert_parallel as parallel
from sparse_pretrain.routing import experts

E, D, F, T, C = 16, 12, 8, 64, 3  # T is over all devices

FLAT = (("expert",), (8,))
NODES = (("node", "expert"), (2, 4))
WAYS = {
    "gathered": (FLAT, parallel.gathered, {"axis": "expert"}),
    "padded": (FLAT, parallel.exchanged, {"axis": "expert"}),
    "padded, many rounds": (FLAT, parallel.exchanged, {"axis": "expert", "chunk": 3}),
    "by node": (NODES, parallel.by_node, {"axis": "expert", "node_axis": "node"}),
    "by node, many rounds": (
        NODES,
        parallel.by_node,
        {"axis": "expert", "node_axis": "node", "chunk": 2, "node_chunk": 5},
    ),
}
LOADS = ("even", "one expert has every token", "half have none", "padding")


def sharded(way):
    (names, sizes), function, options = WAYS[way]
    mesh = Mesh(
        np.array(jax.devices()).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names)
    )
    rows = PartitionSpec(names)
    return jax.shard_map(
        functools.partial(function, **options),
        mesh=mesh,
        in_specs=(rows, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )


def inputs(load):
    rng = np.random.default_rng(0)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = [rng.normal(size=s) / np.sqrt(s[1]) for s in shapes]
    x, share = rng.normal(size=(T, D)), rng.uniform(0.1, 1, (T, C))
    among = E // 2 if load == "half have none" else E
    expert = np.stack([rng.permutation(among)[:C] for _ in range(T)])
    if load == "one expert has every token":
        expert = np.stack([np.append(5, rng.choice(np.delete(np.arange(E), 5), 2, False))] * T)
        expert[:, 1:] = [rng.choice(np.delete(np.arange(E), 5), 2, False) for _ in range(T)]
    if load == "padding":
        expert[rng.random((T, C)) < 0.3] = E
    return weights, x, expert, share, rng.normal(size=(T, D))


def oracle(weights, x, expert, share):
    """Token by token, expert by expert."""
    out = np.zeros_like(x)
    for t in range(T):
        for c in range(C):
            if (e := expert[t, c]) < E:
                gate, up = x[t] @ weights[0][e], x[t] @ weights[1][e]
                out[t] += share[t, c] * ((gate / (1 + np.exp(-gate)) * up) @ weights[2][e])
    return out


def compiled(function):
    def value(weights, x, share, expert, dy):
        y = function(experts.Weights(*weights), x, expert, share)
        return jnp.sum(y * dy), y

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))


@pytest.fixture(scope="module")
def functions():
    return {way: compiled(sharded(way)) for way in WAYS} | {"one": compiled(experts.run)}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("way", WAYS)
def test_many_devices_equal_one(way, load, functions):
    weights, x, expert, share, dy = inputs(load)
    arrays = [jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), a) for a in (weights, x, share)]
    rest = jnp.asarray(expert, jnp.int32), jnp.asarray(dy, jnp.float32)
    (_, y), gradients = functions[way](*arrays, *rest)
    np.testing.assert_allclose(y, oracle(weights, x, expert, share), rtol=1e-4, atol=1e-5)
    _, expected = functions["one"](*arrays, *rest)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_device_gradients_follow_the_oracle(functions):
    # along random directions, by central differences of the float64 loop
    weights, x, expert, share, dy = inputs("padding")
    arrays = [jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), a) for a in (weights, x, share)]
    rest = jnp.asarray(expert, jnp.int32), jnp.asarray(dy, jnp.float32)
    _, gradients = functions["one"](*arrays, *rest)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        flat, tree = jax.tree.flatten((weights, x, share))
        along = [rng.normal(size=a.shape) for a in flat]
        ends = []
        for h in (1e-5, -1e-5):
            w, v, s = jax.tree.unflatten(
                tree, [a + h * d for a, d in zip(flat, along, strict=True)]
            )
            ends.append((oracle(w, v, expert, s) * dy).sum())
        pairs = zip(jax.tree.leaves(gradients), along, strict=True)
        exact = sum((np.asarray(g) * d).sum() for g, d in pairs)
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, exact, rtol=1e-3, atol=1e-3)


def test_nothing_at_all_is_nothing(functions):
    weights, x, _, share, dy = inputs("even")
    nobody = jnp.full((T, C), E, jnp.int32)
    arrays = [jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), a) for a in (weights, x, share)]
    for function in functions.values():
        (_, y), gradients = function(*arrays, nobody, jnp.asarray(dy, jnp.float32))
        for a in (y, *jax.tree.leaves(gradients)):
            assert not np.asarray(a).any()
