"""Mosaic GPU kernels, interpreted on the CPU with race detection, against loops in numpy float64.

One compilation serves every load of a shape, since group sizes are data; memory that nobody wrote
reads as nan. On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its
generation on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, generation, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.grouped_matmul import aligned, contiguous, explain, grouped_matmul, specs, tiles
from kernels_pallas.grouped_matmul.layout import row_expert

runs = pytest.mark.skipif(
    device.jax_version() < (0, 12) and device.target().capability != (9, 0),
    reason="GPU interpretation is public from jax 0.12, and there is no Hopper GPU")
recent = pytest.mark.skipif(
    device.jax_version() < (0, 11), reason="Hopper kernels are refused before jax 0.11")

# Over tiles of 128 rows: edges, empty groups in every place, and all in one.
LOADS = {
    "edges": [127, 0, 128, 129, 0],
    "first takes all": [384, 0, 0, 0, 0],
    "last takes all": [0, 0, 0, 0, 384],
    "ones": [1, 1, 0, 1, 1],
    "even": [76, 77, 77, 77, 77],
    "nothing": [0, 0, 0, 0, 0],
    "skewed": [3, 65, 200, 0, 116],
}


def _gpu(capability, cores):
    if device.target().capability == capability:
        return device.target()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return device.Target("gpu", "interpreted", capability, cores,
                         plgpu.InterpretGPUParams(detect_races=True))


def hopper(cores):
    """A Hopper GPU of so few multiprocessors that each takes several tiles; the real one if any."""
    return _gpu((9, 0), cores)


def blackwell(cores):
    """The same for a B200."""
    return _gpu(generation.BLACKWELL, cores)


def either(cores):
    """The same for kernels that are one for both: the real GPU of either kind, if any."""
    return device.target() if generation.is_blackwell() else hopper(cores)


both = pytest.mark.parametrize("gpu", [hopper, blackwell])


def oracle(x, w, dy, layout):
    """Loop over experts and their rows in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    starts, sizes = np.asarray(layout.starts), np.asarray(layout.sizes)
    for e, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rows = slice(start, start + size)
        y[rows] = x[rows] @ w[e]
        dx[rows] = dy[rows] @ w[e].T
        dw[e] = x[rows].T @ dy[rows]
    return y, dx, dw


def check(got, want, terms):
    """Equal but for one rounding of the result and float32 sums of so many terms near 1."""
    got64 = np.asarray(got, np.float64)
    half_ulp = float(jnp.finfo(got.dtype).eps) / 2
    limit = 1.01 * half_ulp * np.abs(want) + 1e-6 * np.sqrt(terms)
    worst = (np.abs(got64 - want) - limit).max()
    assert worst <= 0, f"{worst:.2e} above the limit"  # nan fails too


def run(gpu, x, w, dy, layout):
    """Values and gradients from the kernels."""
    with device.assume(gpu(2)):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, layout, implementation="mosaic_gpu"),
                          x, w)
        return y, *pull(dy)


def arrays(rng, layout, D, F, w_dtype):
    """x with numbers in every row, w, and a cotangent that is zero where no expert has the row."""
    used = np.asarray(row_expert(layout)[1])[:, None]
    x = jnp.asarray(rng.normal(size=(layout.rows, D)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(layout.sizes.shape[0], D, F)), w_dtype)
    dy = jnp.asarray(rng.normal(size=(layout.rows, F)) * used, jnp.bfloat16)
    return used, x, w, dy


def verify(layout, D, F, w_dtype, rng, compute):
    """Hold values and both gradients against the oracle; rows of no group are finite."""
    used, x, w, dy = arrays(rng, layout, D, F, w_dtype)
    y, dx, dw = compute(x, w, dy, layout)
    rounded = w.astype(jnp.bfloat16)
    want_y, want_dx, want_dw = oracle(x, rounded, dy, layout)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    check(jnp.where(used, y, jnp.zeros_like(y)), want_y, D)
    check(dx, want_dx, F)
    check(dw, want_dw, layout.rows)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    return y, dx, dw


@functools.cache
def compiled(gpu):
    """The three products, compiled once for all loads of 384 pairs."""
    def products(x, w, dy, sizes):
        return run(gpu, x, w, dy, aligned(sizes, pairs=384))

    function = jax.jit(products)
    return lambda x, w, dy, layout: function(x, w, dy, layout.sizes)


@runs
@pytest.mark.parametrize(("gpu", "load"), [
    *((hopper, load) for load in LOADS), (blackwell, "skewed"),
    *(pytest.param(blackwell, load, marks=pytest.mark.slow) for load in LOADS if load != "skewed")])
def test_grouped_matmul(gpu, load, rng):
    layout = aligned(jnp.asarray(LOADS[load], jnp.int32), pairs=384)
    verify(layout, 64, 192, "float32", rng, compiled(gpu))


@runs
@pytest.mark.parametrize("gpu", [hopper, pytest.param(blackwell, marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bits(gpu, rng):
    layout = aligned(jnp.asarray(LOADS["skewed"], jnp.int32), pairs=384)
    _, x, w, dy = arrays(rng, layout, 64, 192, "float32")
    run = compiled(gpu)
    for first, second in zip(run(x, w, dy, layout), run(x, w, dy, layout), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", specs.PARITY)
def test_every_spec(name, gpu, rng):
    spec = specs.PARITY[name]
    (_, _, layout), _ = spec.arguments()
    verify(layout, spec.D, spec.F, spec.w_dtype, rng, functools.partial(run, gpu))


@runs
@pytest.mark.parametrize(("chip", "product"), [("h100", "wgmma"), ("b200", "tcgen05_mma")])
def test_each_generation_has_its_own_kernels(chip, product):
    x, w, layout = _arguments()
    with device.assume(CHIPS[chip].target):
        text = str(jax.make_jaxpr(lambda x, w, layout: grouped_matmul(
            x, w, layout, implementation="mosaic_gpu"))(x, w, layout))
    assert [name for name in ("wgmma", "tcgen05_mma") if name in text] == [product]


def test_every_row_is_in_one_tile(rng):
    for experts, pairs, block in ((1, 700, 128), (16, 6144, 128), (64, 700, 8)):
        lay_out = jax.jit(functools.partial(aligned, pairs=pairs, block=block))
        to_items = jax.jit(tiles.row_items)
        for load in range(4):
            share = rng.dirichlet(np.full(experts, 0.1 if load else 100))
            sizes = rng.multinomial(pairs if load < 3 else 0, share)
            layout = lay_out(jnp.asarray(sizes, jnp.int32))
            items, count = (np.asarray(a) for a in to_items(layout))
            starts, written = np.asarray(layout.starts), np.zeros(layout.rows, int)
            for expert, first, rows, product in items[:count[0]]:
                assert rows <= tiles.TILE_M
                written[first:first + rows] += 1
                end = starts[expert] + sizes[expert]
                assert product == (first < end)
                assert first >= starts[expert]
                assert first + rows <= layout.rows
                assert not (starts > first)[(starts < first + rows) & (sizes > 0)].any()
            assert (written == 1).all()
            # products are done before anything that is only zeroed
            assert (np.diff(items[:count[0], 3]) <= 0).all()


def test_groups_are_contracted_longest_first(rng):
    sizes = rng.integers(0, 300, 7)
    layout = aligned(jnp.asarray(sizes, jnp.int32), pairs=int(sizes.sum()))
    items = np.asarray(tiles.group_items(layout))
    assert sorted(items[:, 0]) == list(range(7))
    assert (np.diff(sizes[items[:, 0]]) <= 0).all()
    for expert, first, chunks, last in items:
        assert first == np.asarray(layout.starts)[expert]
        assert chunks == -(-sizes[expert] // tiles.TILE_K)
        if chunks:  # every used row, and none of another group's
            reach = first + (chunks - 1) * tiles.TILE_K + last
            assert reach >= first + sizes[expert]
            assert reach <= np.append(np.asarray(layout.starts), layout.rows)[expert + 1]


def test_tiles_fit_in_shared_memory():
    layout = aligned(jnp.asarray([300, 0], jnp.int32), pairs=300)
    for columns in range(64, 4096, 64):
        for itemsize in (2, 4):
            plan = tiles.choose(layout, columns, itemsize)
            stages = plan.stages * 2 * tiles.TILE_K * (tiles.TILE_M + plan.n)
            out = plan.out_slots * tiles.TILE_M * tiles.COLUMNS * itemsize
            assert stages + out <= 227 * 1024 - 2048
            assert plan.stages >= 3
            assert 2 * plan.n <= 512  # columns of Blackwell's tensor memory, two tiles at once
            assert plan.n // tiles.COLUMNS % plan.out_slots == 0


def _arguments(dtype="bfloat16", w_dtype="float32", D=64, F=128, block=128):
    shape = jax.ShapeDtypeStruct
    whole = shape((4,), jnp.int32)
    layout = contiguous(whole, whole, 4 * block, block)
    return shape((4 * block, D), dtype), shape((4, D, F), w_dtype), layout


REFUSED = {
    "cpu": (device.Target("cpu"), {}, "needs an NVIDIA GPU, the device is cpu"),
    "tpu": (CHIPS["v5p"].target, {}, "the device is TPU v5"),
    "ampere": (device.Target("gpu", "A100", (8, 0)), {}, r"needs Hopper \(9.0\) or .* is \(8, 0\)"),
    "rows": (CHIPS["h200"].target, {"dtype": "float32"}, "x is float32"),
    "matrices": (CHIPS["h200"].target, {"w_dtype": "float16"}, "w is float16"),
    "D": (CHIPS["h200"].target, {"D": 96}, "D is 96"),
    "F": (CHIPS["h100"].target, {"F": 40}, "F is 40"),
    "starts": (CHIPS["h100"].target, {"block": 12}, "multiples of 8 rows.* blocks of 12"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, reason = REFUSED[name]
    with device.assume(target):
        assert explain(*_arguments())["mosaic_gpu"] is None or not changes
        with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
            grouped_matmul(*_arguments(**changes), implementation="mosaic_gpu")


@pytest.mark.parametrize(("chip", "version", "needs"), [
    ("h200", (0, 10, 2), "jax 0.11"), ("b200", (0, 11, 2), "jax 0.12 on Blackwell")])
def test_an_older_jax_is_refused(chip, version, needs, monkeypatch):
    monkeypatch.setattr(device, "jax_version", lambda: version)
    with device.assume(CHIPS[chip].target):
        assert explain(*_arguments())["mosaic_gpu"].startswith(f"needs {needs}, this is ")


def test_an_assumed_device_ends_with_its_block():
    before = device.target()
    with device.assume(CHIPS["h200"].target) as target:
        assert (device.target(), device.platform()) == (target, "gpu")
    assert device.target() == before
    assert device.platform() == before.platform == jax.default_backend()


def test_shapes_only_makes_no_numbers():
    with numerics.shapes_only():
        assert not np.asarray(numerics.normal((3,), seed=0)).any()
    assert np.asarray(numerics.normal((3,), seed=0)).all()
