"""What the TPU kernels of grouped_matmul do in which order: tiles, and visits of them as data.

Row tiles lie at multiples of their height wherever groups start. A tile is visited once for each
group that owns rows of it, in order, so that it stays in fast memory meanwhile; a group owns the
rows up to the next group's start, so that every tile is visited and every row is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import blocks, device
from kernels_pallas.grouped_matmul.tiles import owned
from kernels_pallas.tpu import LANES, VMEM, sublanes, whole

# Rows that a tile's height is a multiple of: bfloat16 is stored in pairs of 8.
_ROWS = 16
_HEIGHTS = (512, 256, 128)
_WIDTHS = (1024, 768, 512, 384, 256, 128)


class Tiles(NamedTuple):
    """Sizes of one product: rows, contracted width of a step, and columns."""

    m: int
    k: int
    n: int


class Held(NamedTuple):
    """How many arrays of each kind a product of rows has a tile of: rows, matrices, results, sums.

    `stages` are float32 tiles of a result beside the sums, which bending or scaling them takes;
    `scaled` are operands of 8 bits, with a float32 scale for every 128 contracted.
    """

    xs: int = 1
    ws: int = 1
    ys: int = 1
    accs: int = 1
    stages: int = 0
    scaled: bool = False


# By the name of a product: grouped_swiglu's are both products of a row with what becomes of them,
# alone or with the products themselves, and the rows' gradient by both matrices; scaled_matmul's
# are grouped_matmul's of 8-bit numbers.
HELD = {"rows": Held(), "transposed": Held(), "weights": Held(),
        "swiglu": Held(1, 2, 1, 2, 3), "swiglu_kept": Held(1, 2, 3, 2, 3),
        "swiglu_rows": Held(2, 2, 1, 1),
        "scaled": Held(stages=2, scaled=True), "scaled_transposed": Held(stages=2, scaled=True),
        "scaled_weights": Held(stages=2, scaled=True)}
TRANSPOSED = ("transposed", "swiglu_rows", "scaled_transposed")
WEIGHTS = ("weights", "scaled_weights")
OPS = {name: "grouped_swiglu" if "swiglu" in name else "scaled_matmul" if "scaled" in name else
       "grouped_matmul" for name in HELD}


class Visits(NamedTuple):
    """A table per column, [V] int32 each, of which the first `count` visits are made.

    `tile` of the result; `source`, `matrix` the row tile and expert to load, those of the visit
    before where there is nothing to multiply; `expert`; rows [low, high) of the tile that the
    group uses; whether the visit is the `first` and the `last` of its tile or its expert.
    """

    count: Any
    tile: Any
    source: Any
    matrix: Any
    expert: Any
    low: Any
    high: Any
    first: Any
    last: Any


def supports(x, w, layout, products=("rows", "transposed")) -> str | None:
    """Return None, or why the TPU kernels cannot run this call: products of rows, and their own."""
    if lacks := device.lacks_tpu(x=x):
        return lacks
    if layout.split:
        return "needs each expert's rows in one place, the layout was made with split=True"
    if layout.rows == 0 or w.shape[0] == 0:
        return f"needs rows and experts, there are {layout.rows} and {w.shape[0]}"
    sides = (("D", w.shape[1], w.shape[2]), ("F", w.shape[2], w.shape[1]))
    for product in products:
        name, width, columns = sides[product in TRANSPOSED]
        if not _steps(product, width, columns, x.dtype.itemsize, _HEIGHTS[-1]):
            return f"needs a width that fits in fast memory or a multiple of 128, {name} is {width}"
    return None


def supports_swiglu(x, gate, up, layout) -> str | None:
    """Return None, or why they cannot run this call of grouped_swiglu."""
    del up
    return supports(x, gate, layout, ("swiglu_kept", "swiglu_rows"))


def _bytes(tiles: Tiles, itemsize: int, held: Held = HELD["rows"]) -> int:
    """Fast memory of one product: operands and results twice, and the float32 sums and stages."""
    m, k, n = (-(-t // LANES) * LANES for t in tiles)
    operands, results = held.xs * m * k + held.ws * k * n, held.ys * m * n
    sums = 4 * (held.accs + held.stages) * m * n
    if held.scaled:
        scales = 4 * whole(k // LANES, sublanes(4)) * (m + n)
        return 2 * (operands + scales + itemsize * results) + sums
    return 2 * itemsize * (operands + results) + sums


def _steps(product: str, width: int, columns: int, itemsize: int, m: int) -> list[Tiles]:
    """The tiles of this height that fit, the contracted width whole or in equal steps."""
    n_all = [n for n in _WIDTHS if n < columns + LANES] if columns > LANES else [columns]
    held, found = HELD[product], []
    for n in n_all:
        n = min(n, columns)
        for steps in range(1, width // LANES + 1):
            if width % steps == 0 and (steps == 1 or width // steps % LANES == 0):
                tiles = Tiles(m, width // steps, n)
                if _bytes(tiles, itemsize, held) <= VMEM:
                    found.append(tiles)
                    break
        else:
            if width < LANES and _bytes(Tiles(m, width, n), itemsize, held) <= VMEM:
                found.append(Tiles(m, width, n))
    return found


def choose(layout, product: str, contracted: int, columns: int, itemsize: int) -> Tiles:
    """Return the tiles of a product of HELD: tuned ones, or those of least work and traffic.

    Of weights `contracted` is the result's height.
    """
    R, E = layout.rows, layout.sizes.shape[0]
    # a scale of every row lies in a lane
    most = whole(R, LANES if HELD[product].scaled else _ROWS)
    heights = sorted({min(m, most) for m in _HEIGHTS})
    every = [t for m in heights for t in _options(product, m, contracted, columns, itemsize)]

    def cost(tiles):
        # every group ends in a tile of its own; an estimate that the tuner replaces
        work = (R + E * tiles.m) * -(-columns // tiles.n) * tiles.n
        if product in WEIGHTS:
            work = work * (-(-contracted // tiles.k) * tiles.k) / contracted
        return work * (1 + LANES / tiles.m) * (1 + LANES / tiles.n) * (1 + LANES / tiles.k)

    as_blocks = [t._asdict() for t in every]
    workload = {"product": product, "rows": R, "experts": E, "contracted": contracted,
                "columns": columns, "itemsize": itemsize}
    found = blocks.choose(OPS[product], "mosaic_tpu", workload, min(every, key=cost)._asdict(),
                          as_blocks)
    return Tiles(**found)


def _options(product, m, contracted, columns, itemsize):
    if product not in WEIGHTS:
        return _steps(product, contracted, columns, itemsize, m)
    # of a gradient k is a tile's height in the result
    sides = [[n for n in _WIDTHS if n < side + LANES] or [side] for side in (contracted, columns)]
    every = [Tiles(m, min(k, contracted), min(n, columns)) for k in sides[0] for n in sides[1]]
    return [t for t in every if _gradient_bytes(product, t, itemsize) <= VMEM]


def _gradient_bytes(product, tiles, itemsize):
    m, k, n = tiles
    if HELD[product].scaled:
        return _bytes(Tiles(k, m, n), itemsize, HELD[product])
    return _bytes(tiles, 4)  # which is float32 at most


def _table(count_E, first_tile_E, layout, m):
    """Number the visits: (count [1], expert [V], tile [V])."""
    E = layout.sizes.shape[0]
    ends = jnp.cumsum(count_E, dtype=jnp.int32)
    visit = jnp.arange(-(-layout.rows // m) + E, dtype=jnp.int32)
    expert = jnp.minimum((visit[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32), E - 1)
    tile = first_tile_E[expert] + visit - (ends - count_E)[expert]
    return ends[-1:], expert, jnp.clip(tile, 0, -(-layout.rows // m) - 1)


def _visits(count, expert, tile, by, layout, m):
    """Fill in the columns; `by` is what runs of visits share: tiles or experts."""
    sizes, starts = layout.sizes.astype(jnp.int32), layout.starts.astype(jnp.int32)
    low = jnp.clip(starts[expert] - tile * m, 0, m)
    high = jnp.clip(starts[expert] + sizes[expert] - tile * m, 0, m)
    product = high > low
    matrix, source = (jax.lax.cummax(jnp.where(product, x, 0)) for x in (expert, tile))
    change = by[1:] != by[:-1]
    edge = jnp.ones(1, bool)
    visit = jnp.arange(by.shape[0], dtype=jnp.int32)
    last = jnp.concatenate([change, edge]) | (visit == count[0] - 1)
    first = jnp.concatenate([edge, change])
    return Visits(count, tile, source, matrix, expert, low, high, first.astype(jnp.int32),
                  last.astype(jnp.int32))


def of_rows(layout, m: int) -> Visits:
    """Return the visits of row tiles: every tile, once for each group that owns rows of it."""
    have, starts = owned(layout), layout.starts.astype(jnp.int32)
    first = starts // m
    count = jnp.where(have > 0, (starts + have - 1) // m - first + 1, 0)
    count, expert, tile = _table(count, first, layout, m)
    return _visits(count, expert, tile, tile, layout, m)


def of_groups(layout, m: int) -> Visits:
    """Return the visits of groups: the tiles that hold rows they use, one where they use none."""
    sizes, starts = layout.sizes.astype(jnp.int32), layout.starts.astype(jnp.int32)
    first = starts // m
    count = jnp.where(sizes > 0, (starts + sizes - 1) // m - first + 1, 1)
    count, expert, tile = _table(count, first, layout, m)
    return _visits(count, expert, tile, expert, layout, m)
