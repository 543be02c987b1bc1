"""linear and grouped_matmul against numpy, for every kind of load, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import aligned, grouped_matmul, op, xla
from kernels_pallas.grouped_matmul.layout import row_expert, rows_needed
from kernels_pallas.linear import linear
from kernels_pallas.linear import op as linear_op
from kernels_pallas.linear.xla import split_rows

ANYWHERE = [backend.name for backend in op.backends  # the others have tests of their own
            if backend.name not in ("mosaic_gpu", "mosaic_tpu", "tokamax")]
LOADS = {
    "even": [64] * 8,
    "one takes all": [0, 0, 0, 512, 0, 0, 0, 0],
    "first takes all": [512] + [0] * 7,
    "last takes all": [0] * 7 + [512],
    "skewed": [200, 3, 0, 150, 9, 100, 0, 50],
    "nothing": [0] * 8,
    "fewer than pairs": [10, 20, 30, 0, 1, 2, 3, 4],
}


def _numpy(x, w, dy, layout):
    """Loop over experts and their rows in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for e, size in enumerate(np.asarray(layout.sizes)):
        home = min(int(size), int(layout.home))
        near, far = int(layout.starts[e]), int(layout.beyond[e])
        rows = [*range(near, near + home), *range(far, far + int(size) - home)]
        y[rows] = x[rows] @ w[e]
        dx[rows] = dy[rows] @ w[e].T
        dw[e] = x[rows].T @ dy[rows]
    return y, dx, dw


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("load", LOADS)
def test_grouped_matmul(load, dtype, implementation, rng):
    D, F = 24, 40
    layout = aligned(jnp.asarray(LOADS[load], jnp.int32), pairs=512)
    _, used = row_expert(layout)
    keep = np.asarray(used)[:, None]
    assert keep.sum() == sum(LOADS[load])
    x = jnp.asarray(rng.normal(size=(layout.rows, D)), dtype)  # rows of no group hold anything
    dy = jnp.asarray(rng.normal(size=(layout.rows, F)) * keep, dtype)
    w = jnp.asarray(rng.normal(size=(8, D, F)), jnp.float32)

    def f(x, w):
        return grouped_matmul(x, w, layout, implementation=implementation)

    y, pull = jax.vjp(f, x, w)
    dx, dw = pull(dy)
    rounded = w.astype(dtype).astype(jnp.float32)
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    results = (y * keep.astype(dtype), dx, dw)
    for ours, oracle in zip(results, _numpy(x, rounded, dy, layout), strict=True):
        scale = max(np.abs(oracle).max(), 1.0)
        np.testing.assert_allclose(
            np.asarray(ours, np.float64) / scale, oracle / scale, atol=tolerance
        )
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)


# loads of 12 experts with 32 rows in the mean, and the (home, block) that they are given
PATHS = {
    "even": ([32] * 12, (32, 8)),
    "nearly even": ([40, 29, 35, 24] * 3, (32, 8)),
    "uneven": ([60, 20, 56, 8, 70, 4, 70, 10, 40, 16, 25, 5], (16, 16)),
    "one expert": ([0, 384] + [0] * 10, (0, 8)),
}


@pytest.mark.parametrize(("load", "turns"), [("uneven", "one"), *((n, "many") for n in PATHS)])
def test_homes_and_what_lies_beyond(load, turns, rng, monkeypatch):
    if turns == "many":
        monkeypatch.setattr(xla, "_COPIED", 1)  # four blocks a turn, and the last reaches back
    D, F = 24, 40
    sizes, path = PATHS[load]
    layout = aligned(jnp.asarray(sizes, jnp.int32), pairs=384, split=True)
    assert layout.paths[int(layout.path)] == path, layout.paths
    keep = np.asarray(row_expert(layout)[1])[:, None]
    assert keep.sum() == sum(sizes)
    x = rng.normal(size=(layout.rows, D)).astype(np.float32)
    dy = (rng.normal(size=(layout.rows, F)) * keep).astype(np.float32)
    w = rng.normal(size=(12, D, F)).astype(np.float32)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, layout, implementation="xla"), x, w)
    results = (np.asarray(y) * keep, *pull(jnp.asarray(dy)))
    for ours, oracle in zip(results, _numpy(x, w, dy, layout), strict=True):
        scale = np.abs(oracle).max()
        np.testing.assert_allclose(np.asarray(ours) / scale, oracle / scale, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_any_split_fits_in_one_buffer(split, rng):
    taken = set()
    for experts, pairs in ((4, 64), (16, 6144), (64, 1000), (256, 2048), (3, 7)):
        rows, _ = rows_needed(pairs, experts, 128, 1.25)

        @jax.jit
        def of(sizes, expert, number, pairs=pairs):
            layout = aligned(sizes, pairs=pairs, split=split)
            return layout, layout.place(expert, number), *row_expert(layout)

        for spread in np.tile([0.1, 1, 10, 1000], 6):
            sizes = rng.multinomial(pairs, rng.dirichlet(np.full(experts, spread))).astype(np.int32)
            owner = np.repeat(np.arange(experts, dtype=np.int32), sizes)
            number = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
            layout, row, expert, used = jax.tree.map(np.asarray, of(sizes, owner, number))
            taken.add(int(layout.path))
            assert layout.rows == rows
            assert row.max() < rows
            assert len(set(row.tolist())) == pairs
            # the other way around: every row in use knows its expert
            assert np.flatnonzero(used).tolist() == sorted(row.tolist())
            assert (expert[row] == owner).all()
            # what kernels and the loop need: nothing of an expert's but from whole blocks on
            home, block = layout.paths[int(layout.path)]
            far = (layout.beyond if home else layout.starts) - experts * home
            assert not block or (far % block == 0).all()
    assert taken == set(range(3 if split else 2))


@pytest.mark.parametrize("implementation", [backend.name for backend in linear_op.backends])
@pytest.mark.parametrize("shape", [(7,), (2, 33), (4, 256), (1, 1)])
def test_linear_and_its_gradients(shape, implementation, rng):
    x = jnp.asarray(rng.normal(size=(*shape, 24)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(24, 40)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(*shape, 40)), jnp.float32)
    y, pull = jax.vjp(lambda x, w: linear(x, w, implementation=implementation), x, w)
    dx, dw = pull(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    np.testing.assert_allclose(y, x64 @ w64, atol=1e-4)
    np.testing.assert_allclose(dx, dy64 @ w64.T, atol=1e-4)
    np.testing.assert_allclose(dw, x64.reshape(-1, 24).T @ dy64.reshape(-1, 40), atol=1e-3)


def test_rows_are_split_evenly():
    for rows in (1, 2, 7, 100, 1024, 4096, 4099, 8192):
        assert rows % split_rows(rows) == 0
