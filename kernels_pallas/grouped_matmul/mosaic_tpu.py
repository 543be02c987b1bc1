"""grouped_matmul on a TPU's matrix units, accumulated in float32, forward and backward.

Each step of the grid multiplies a tile of rows with a tile of one expert's matrix; which is read
from tables (visits.py) before the step's copies start. A tile of the result is added up in order
and stays in fast memory while its groups take turns: the same bits every time.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.grouped_matmul import visits
from kernels_pallas.grouped_matmul.derivative import differentiable


def _parts(refs, *counts):
    """Part a list into lists of so many."""
    refs = iter(refs)
    return [list(itertools.islice(refs, n)) for n in counts]


def _rows_body(product, steps, bend, scale, tile, source, matrix, low, high, first, *refs):
    """One contracted step of one visit of a tile of the results."""
    del tile, source, matrix
    visit, step = pl.program_id(1), pl.program_id(2)
    dim, held = 1 if product in visits.TRANSPOSED else 0, visits.HELD[product]
    xs, ws, scales, ys, accs = _parts(refs, held.xs, held.ws, 2 * held.scaled, held.ys, held.accs)
    pairs = [[(xs[0], w)] for w in ws] if bend else [[*zip(xs, ws, strict=True)]]
    some = high[visit] > low[visit]

    @pl.when(some)
    def _():
        if scale:
            @pl.when(step == 0)
            def _():
                accs[0][...] = jnp.zeros_like(accs[0])

            scale(accs[0], xs[0], ws[0], (1, dim), *scales)
            return
        for acc, each in zip(accs, pairs, strict=True):
            part = functools.reduce(jnp.add, [tpu.dot(x[...], w[...], (1, dim)) for x, w in each])
            if steps == 1:
                acc[...] = part
            else:
                acc[...] = jnp.where(step == 0, part, acc[...] + part)

    @pl.when(some & (step == steps - 1))
    def _():
        row = lax.broadcasted_iota(jnp.int32, ys[0].shape, 0)
        mine = (row >= low[visit]) & (row < high[visit])
        made = bend(*(acc[...] for acc in accs)) if bend else accs
        for y, values in zip(ys, made, strict=True):
            # the groups before, or nothing yet; what nobody uses is zero
            before = jnp.where(first[visit] == 1, 0.0, y[...].astype(jnp.float32))
            y[...] = jnp.where(mine, values[...], before).astype(y.dtype)

    @pl.when((high[visit] <= low[visit]) & (step == 0) & (first[visit] == 1))
    def _():
        for y in ys:
            y[...] = jnp.zeros_like(y)


def rows_times(product, xs, ws, layout, *, bend=None, scale=None, scales=(), dtype=None):
    """Rows times each expert's matrices w [E, K, N], or the transposes of its w [E, N, K].

    `product` is of visits.HELD. Without `bend`, xs [R, K] go with a matrix each and the sum of the
    products is returned, [R, N]. With it they are one, the products go to `bend` in float32, and
    what that returns is returned, each [R, N]. With `scale` they have `scales` [K / 128, R] and
    [E, K / 128, N]; scale(sum, x, w, contracted dims, *scales) adds a step's product to the sum.
    Results have `dtype`, the rows' unless given.
    """
    held, transposed = visits.HELD[product], product in visits.TRANSPOSED
    (R, K), N = xs[0].shape, ws[0].shape[1 if transposed else 2]
    dtype = jnp.dtype(dtype or xs[0].dtype)
    m, k, n = visits.choose(layout, product, K, N, dtype.itemsize)
    table = visits.of_rows(layout, m)
    steps = K // k

    def contracted(v, step, low, high):
        # nothing new is loaded for a visit without a product
        return jnp.where(high[v] > low[v], step, steps - 1)

    def x_map(j, v, s, tile, source, matrix, low, high, first):
        return source[v], contracted(v, s, low, high)

    def w_map(j, v, s, tile, source, matrix, low, high, first):
        at = contracted(v, s, low, high)
        return (matrix[v], j, at) if transposed else (matrix[v], at, j)

    def y_map(j, v, s, tile, *_):
        return tile[v], j

    def by_row_map(j, v, s, tile, source, matrix, low, high, first):
        return contracted(v, s, low, high), 0, source[v]

    def by_column_map(j, v, s, tile, source, matrix, low, high, first):
        return matrix[v], contracted(v, s, low, high), 0, j

    in_specs = [pl.BlockSpec((m, k), x_map)] * held.xs + [
        pl.BlockSpec((None, n, k) if transposed else (None, k, n), w_map)] * held.ws
    if scale:
        by_row, by_column = scales
        at_once = k // tpu.LANES
        scales = (by_row.reshape(steps, at_once, -1), by_column.reshape(-1, steps, at_once, N))
        in_specs += [pl.BlockSpec((None, at_once, m), by_row_map),
                     pl.BlockSpec((None, None, at_once, n), by_column_map)]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(-(-N // n), table.count[0], steps),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((m, n), y_map)] * held.ys,
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)] * held.accs,
    )
    made = tpu.call(
        functools.partial(_rows_body, product, steps, bend, scale), visits.OPS[product],
        [jax.ShapeDtypeStruct((R, N), dtype)] * held.ys,
        ("parallel", "arbitrary", "arbitrary"), grid_spec=grid,
    )(table.tile, table.source, table.matrix, table.low, table.high, table.first, *xs, *ws, *scales)
    return made if bend else made[0]


def _weights_body(m, scale, tile, expert, low, high, first, last, x, dy, *refs):
    """Add a tile's rows of one group to the gradient of its matrix."""
    del tile, expert
    *scales, dw, acc = refs
    visit = pl.program_id(2)
    whole = (low[visit] == 0) & (high[visit] == m)

    @pl.when(first[visit] == 1)
    def _():
        acc[...] = jnp.zeros_like(acc)

    if scale:
        scale(acc, x, dy, (0, 0), *scales, low[visit], high[visit])
    else:
        @pl.when(whole)
        def _():
            acc[...] += tpu.dot(x[...], dy[...], (0, 0))

        @pl.when(jnp.logical_not(whole) & (high[visit] > low[visit]))
        def _():
            def mine(a):  # of both: rows of other groups, or beyond the buffer, may hold anything
                row = lax.broadcasted_iota(jnp.int32, a.shape, 0)
                return jnp.where((row >= low[visit]) & (row < high[visit]), a[...],
                                 jnp.zeros(a.shape, a.dtype))

            acc[...] += tpu.dot(mine(x), mine(dy), (0, 0))

    @pl.when(last[visit] == 1)
    def _():
        dw[...] = acc[...].astype(dw.dtype)


def weight_gradient(x_RxD, dy_RxF, layout, dtype, *, product="weights", scale=None, scales=()):
    """The sum over each expert's rows of x^T dy: [E, D, F] in dtype.

    `product` is of visits.WEIGHTS. With `scale` groups have whole tiles of 128 rows from multiples
    of 128 on, and x and dy have `scales` [R / 128, D] and [R / 128, F];
    scale(sum, x, dy, contracted dims, *scales, low, high) adds the product of rows [low, high).
    """
    D, F, E = x_RxD.shape[1], dy_RxF.shape[1], layout.sizes.shape[0]
    itemsize = jnp.dtype(dtype if scale else x_RxD.dtype).itemsize
    m, k, n = visits.choose(layout, product, D, F, itemsize)
    table = visits.of_groups(layout, m)
    in_specs = [pl.BlockSpec((m, k), lambda i, j, v, tile, *_: (tile[v], i)),
                pl.BlockSpec((m, n), lambda i, j, v, tile, *_: (tile[v], j))]
    if scale:
        at_once = m // tpu.LANES
        spare = -scales[0].shape[0] % at_once
        scales = [jnp.pad(a, ((0, spare), (0, 0))).reshape(-1, at_once, a.shape[1])
                  for a in scales]
        in_specs += [pl.BlockSpec((None, at_once, k), lambda i, j, v, tile, *_: (tile[v], 0, i)),
                     pl.BlockSpec((None, at_once, n), lambda i, j, v, tile, *_: (tile[v], 0, j))]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(-(-D // k), -(-F // n), table.count[0]),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((None, k, n), lambda i, j, v, tile, expert, *_: (expert[v], i, j)),
        scratch_shapes=[pltpu.VMEM((k, n), jnp.float32)],
    )
    return tpu.call(
        functools.partial(_weights_body, m, scale), f"{visits.OPS[product]}_weights",
        jax.ShapeDtypeStruct((E, D, F), dtype), ("parallel", "parallel", "arbitrary"),
        grid_spec=grid,
    )(table.tile, table.expert, table.low, table.high, table.first, table.last, x_RxD, dy_RxF,
      *scales)


# Each row of expert e times w[e]; rows of no group become zero.
grouped_matmul = differentiable(
    lambda x, w, layout: rows_times("rows", [x], [w], layout),
    lambda dy, w, layout: rows_times("transposed", [dy], [w], layout), weight_gradient)
