"""linear and grouped_matmul against numpy, for every kind of load, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import aligned, grouped_matmul, xla
from kernels_pallas.grouped_matmul.layout import row_expert, rows_needed
from kernels_pallas.linear import linear
from kernels_pallas.linear.xla import split_rows

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
    for e, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
        rows = slice(int(start), int(start) + int(size))
        y[rows] = x[rows] @ w[e]
        dx[rows] = dy[rows] @ w[e].T
        dw[e] = x[rows].T @ dy[rows]
    return y, dx, dw


@pytest.mark.parametrize("implementation", ["xla", "reference"])  # mosaic_gpu: its own file
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


@pytest.mark.parametrize("turns", ["one turn", "several, the last reaches back"])
def test_wide_blocks(turns, rng, monkeypatch):
    if turns != "one turn":
        monkeypatch.setattr(xla, "_COPIED", 1)  # four blocks a turn, of the 15 that there are
    D, F = 24, 40
    sizes = [1000, 900, 700, 472]  # 4 + 4 + 3 + 2 blocks of 256; an even share is 768
    layout = aligned(jnp.asarray(sizes, jnp.int32), pairs=3072)
    assert (layout.wide, bool(layout.broad), bool(layout.uniform)) == (256, True, False)
    assert layout.starts.tolist() == [0, 1024, 2048, 2816]
    keep = np.asarray(row_expert(layout)[1])[:, None]
    assert keep.sum() == sum(sizes)
    x = rng.normal(size=(layout.rows, D)).astype(np.float32)
    dy = (rng.normal(size=(layout.rows, F)) * keep).astype(np.float32)
    w = rng.normal(size=(4, D, F)).astype(np.float32)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, layout, implementation="xla"), x, w)
    results = (np.asarray(y) * keep, *pull(jnp.asarray(dy)))
    for ours, oracle in zip(results, _numpy(x, w, dy, layout), strict=True):
        scale = np.abs(oracle).max()
        np.testing.assert_allclose(np.asarray(ours) / scale, oracle / scale, atol=1e-5)


def test_any_split_fits_in_one_buffer(rng):
    for experts, pairs in ((4, 64), (16, 6144), (16, 24576), (64, 1000), (256, 2048), (3, 7)):
        rows, block = rows_needed(pairs, experts, 128, 1.25)
        for _ in range(50):
            sizes = rng.multinomial(pairs, rng.dirichlet(np.full(experts, 0.1)))
            assert (-(-sizes // block) * block).sum() <= rows
            layout = aligned(jnp.asarray(sizes, jnp.int32), pairs=pairs)
            ends = np.asarray(layout.starts) + sizes
            assert (ends[:-1] <= np.asarray(layout.starts)[1:]).all()
            assert ends[-1] <= layout.rows
            if not layout.uniform:
                unit = layout.wide if layout.broad else layout.block
                assert (np.asarray(layout.starts) % unit == 0).all()


@pytest.mark.parametrize("shape", [(7,), (2, 33), (4, 256), (1, 1)])
def test_linear_and_its_gradients(shape, rng):
    x = jnp.asarray(rng.normal(size=(*shape, 24)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(24, 40)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(*shape, 40)), jnp.float32)
    y, pull = jax.vjp(linear, x, w)
    dx, dw = pull(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    np.testing.assert_allclose(y, x64 @ w64, atol=1e-4)
    np.testing.assert_allclose(dx, dy64 @ w64.T, atol=1e-4)
    np.testing.assert_allclose(dw, x64.reshape(-1, 24).T @ dy64.reshape(-1, 40), atol=1e-3)


def test_rows_are_split_evenly():
    for rows in (1, 2, 7, 100, 1024, 4096, 4099, 8192):
        assert rows % split_rows(rows) == 0
