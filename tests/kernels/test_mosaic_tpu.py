"""Mosaic TPU kernels of grouped_matmul, interpreted with race detection, against float64 loops.

Memory that nobody wrote reads as nan. On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same
tests on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import blocks, device
from kernels_pallas.chips import CHIPS
from kernels_pallas.grouped_matmul import (
    aligned,
    contiguous,
    explain,
    grouped_matmul,
    specs,
    visits,
)
from tests.kernels.test_mosaic_gpu import LOADS, arrays, verify

SMALL = visits.Tiles(64, 128, 128)  # of 480 rows and 256 columns, so that there are several


def chip():
    """A TPU, interpreted where there is none."""
    if jax.default_backend() == "tpu":
        return device.target()
    from jax.experimental.pallas import tpu as pltpu

    return device.Target("tpu", "interpreted", interpret=pltpu.InterpretParams(detect_races=True))


def run(x, w, dy, layout):
    """Values and gradients from the kernels."""
    with device.assume(chip()):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, layout, implementation="mosaic_tpu"),
                          x, w)
        return y, *pull(dy)


def small_tiles(layout, D, F):
    """Requests of all three products answered with small tiles."""
    products = (("rows", D, F), ("transposed", F, D), ("weights", D, F))
    names = [blocks.name_of("grouped_matmul", "mosaic_tpu", {
        "product": product, "rows": layout.rows, "experts": layout.sizes.shape[0],
        "contracted": contracted, "columns": columns, "itemsize": 2})
        for product, contracted, columns in products]
    return blocks.trying({name: SMALL._asdict() for name in names})


@pytest.fixture(scope="module")
def compiled():
    """The three products in small tiles, compiled once for all loads of 384 pairs."""
    def products(x, w, dy, sizes):
        layout = aligned(sizes, pairs=384)
        with small_tiles(layout, 128, 256):
            return run(x, w, dy, layout)

    function = jax.jit(products)
    return lambda x, w, dy, layout: function(x, w, dy, layout.sizes)


@pytest.mark.parametrize("load", ["edges", "nothing"])
def test_grouped_matmul(load, compiled, rng):
    layout = aligned(jnp.asarray(LOADS[load], jnp.int32), pairs=384)
    verify(layout, 128, 256, "float32", rng, compiled)


@pytest.mark.slow
def test_two_runs_give_the_same_bits(compiled, rng):
    layout = aligned(jnp.asarray(LOADS["skewed"], jnp.int32), pairs=384)
    _, x, w, dy = arrays(rng, layout, 128, 256, "float32")
    for first, second in zip(compiled(x, w, dy, layout), compiled(x, w, dy, layout), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_a_neighbours_infinity_stays_its_own(compiled, rng):
    layout = aligned(jnp.asarray(LOADS["skewed"], jnp.int32), pairs=384)
    _, x, w, dy = arrays(rng, layout, 128, 256, "float32")
    row = int(layout.starts[2])
    _, _, clean = compiled(x, w, dy, layout)
    y, _, dw = compiled(x.at[row].set(jnp.inf), w, dy, layout)
    bad = ~np.isfinite(np.asarray(dw)).all((1, 2))
    assert bad.tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(dw[:2], clean[:2])
    assert not np.isfinite(np.asarray(y, np.float32)[row]).any()
    assert np.isfinite(np.delete(np.asarray(y, np.float32), row, 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, rng):
    spec = specs.PARITY[name]
    (_, _, layout), _ = spec.arguments()
    verify(layout, spec.D, spec.F, spec.w_dtype, rng, run)


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
def test_every_load_in_small_tiles(load, rng):
    layout = aligned(jnp.asarray(LOADS[load], jnp.int32), pairs=384)
    with small_tiles(layout, 256, 384):
        verify(layout, 256, 384, "bfloat16", rng, run)


def test_every_row_and_every_group_is_visited(rng):
    for experts, pairs, block, m in ((1, 700, 128, 256), (16, 6144, 128, 512), (64, 700, 8, 32)):
        rows_of = jax.jit(functools.partial(aligned, pairs=pairs, block=block))
        tables = jax.jit(lambda layout, m=m: (visits.of_rows(layout, m),
                                              visits.of_groups(layout, m)))
        for load in range(4):
            share = rng.dirichlet(np.full(experts, 0.1 if load else 100))
            sizes = rng.multinomial(pairs if load < 3 else 0, share)
            layout = rows_of(jnp.asarray(sizes, jnp.int32))
            starts = np.asarray(layout.starts)
            for number, table in enumerate(jax.tree.map(np.asarray, tables(layout))):
                used = np.zeros(layout.rows + m, int)
                count = int(table.count[0])
                made = list(zip(*(column[:count] for column in table[1:]), strict=True))
                for tile, source, matrix, expert, low, high, _, _ in made:
                    if high > low:
                        assert (source, matrix) == (tile, expert)
                        used[tile * m + low:tile * m + high] += 1
                        assert starts[expert] <= tile * m + low
                        assert tile * m + high <= starts[expert] + sizes[expert]
                assert used.sum() == sizes.sum()
                assert used.max(initial=0) <= 1
                # runs of visits: every tile, or every group, once, and its ends are marked
                by = table.expert if number else table.tile
                whole = experts if number else -(-layout.rows // m)
                first, last = table.first[:count] == 1, table.last[:count] == 1
                assert by[:count][first].tolist() == by[:count][last].tolist() == [*range(whole)]
                assert (np.diff(by[:count]) >= 0).all()


def test_tiles_fit_in_fast_memory():
    layout = aligned(jnp.asarray([3000, 0], jnp.int32), pairs=3000)
    for D, F in ((64, 100), (256, 512), (2048, 1408), (7168, 2048), (2048, 7168), (16384, 512)):
        for itemsize in (2, 4):
            for product, contracted, columns in (("rows", D, F), ("transposed", F, D)):
                tiles = visits.choose(layout, product, contracted, columns, itemsize)
                assert visits._bytes(tiles, itemsize) <= visits.VMEM
                assert contracted % tiles.k == 0
                assert tiles.k == contracted or tiles.k % 128 == 0
                assert tiles.n == columns or tiles.n % 128 == 0
            tiles = visits.choose(layout, "weights", D, F, itemsize)
            assert visits._bytes(tiles, 4) <= visits.VMEM


def _arguments(dtype="bfloat16", D=64, F=128):
    shape = jax.ShapeDtypeStruct
    whole = shape((4,), jnp.int32)
    layout = contiguous(whole, whole, 512, 128)
    return shape((512, D), dtype), shape((4, D, F), jnp.float32), layout


@pytest.mark.parametrize(("target", "changes", "reason"), [
    (device.Target("cpu"), {}, "needs a TPU, the device is cpu"),
    (CHIPS["h200"].target, {}, "the device is NVIDIA H200"),
    (CHIPS["v6e"].target, {"dtype": "float16"}, "x is float16"),
    (CHIPS["v5p"].target, {"D": 80001}, "a multiple of 128, D is 80001"),
])
def test_what_is_not_served_is_refused_with_a_reason(target, changes, reason):
    with device.assume(target):
        assert explain(*_arguments())["mosaic_tpu"] is None or not changes
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            grouped_matmul(*_arguments(**changes), implementation="mosaic_tpu")
