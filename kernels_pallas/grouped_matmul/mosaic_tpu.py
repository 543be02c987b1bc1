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


def _rows_body(product, steps, bend, tile, source, matrix, low, high, first, *refs):
    """One contracted step of one visit of a tile of the results."""
    del tile, source, matrix
    visit, step = pl.program_id(1), pl.program_id(2)
    dim = 1 if product in visits.TRANSPOSED else 0
    xs, ws, ys, accs = _parts(refs, *visits.HELD[product][:4])
    pairs = [[(xs[0], w)] for w in ws] if bend else [[*zip(xs, ws, strict=True)]]
    some = high[visit] > low[visit]

    @pl.when(some)
    def _():
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


def rows_times(product, xs, ws, layout, *, bend=None):
    """Rows times each expert's matrices w [E, K, N], or the transposes of its w [E, N, K].

    `product` is of visits.HELD. Without `bend`, xs [R, K] go with a matrix each and the sum of the
    products is returned, [R, N]. With it they are one, the products go to `bend` in float32, and
    what that returns is returned, each [R, N].
    """
    held, transposed = visits.HELD[product], product in visits.TRANSPOSED
    (R, K), N = xs[0].shape, ws[0].shape[1 if transposed else 2]
    m, k, n = visits.choose(layout, product, K, N, xs[0].dtype.itemsize)
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

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(-(-N // n), table.count[0], steps),
        in_specs=[pl.BlockSpec((m, k), x_map)] * held.xs + [
            pl.BlockSpec((None, n, k) if transposed else (None, k, n), w_map)] * held.ws,
        out_specs=[pl.BlockSpec((m, n), y_map)] * held.ys,
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)] * held.accs,
    )
    made = tpu.call(
        functools.partial(_rows_body, product, steps, bend), visits.OPS[product],
        [jax.ShapeDtypeStruct((R, N), xs[0].dtype)] * held.ys,
        ("parallel", "arbitrary", "arbitrary"), grid_spec=grid,
    )(table.tile, table.source, table.matrix, table.low, table.high, table.first, *xs, *ws)
    return made if bend else made[0]


def _weights_body(m, tile, expert, low, high, first, last, x, dy, dw, acc):
    """Add a tile's rows of one group to the gradient of its matrix."""
    del tile, expert
    visit = pl.program_id(2)
    whole = (low[visit] == 0) & (high[visit] == m)

    @pl.when(first[visit] == 1)
    def _():
        acc[...] = jnp.zeros_like(acc)

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


def weight_gradient(x_RxD, dy_RxF, layout, dtype):
    """The sum over each expert's rows of x^T dy: [E, D, F] in dtype."""
    D, F, E = x_RxD.shape[1], dy_RxF.shape[1], layout.sizes.shape[0]
    m, k, n = visits.choose(layout, "weights", D, F, x_RxD.dtype.itemsize)
    table = visits.of_groups(layout, m)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(-(-D // k), -(-F // n), table.count[0]),
        in_specs=[pl.BlockSpec((m, k), lambda i, j, v, tile, *_: (tile[v], i)),
                  pl.BlockSpec((m, n), lambda i, j, v, tile, *_: (tile[v], j))],
        out_specs=pl.BlockSpec((None, k, n), lambda i, j, v, tile, expert, *_: (expert[v], i, j)),
        scratch_shapes=[pltpu.VMEM((k, n), jnp.float32)],
    )
    return tpu.call(
        functools.partial(_weights_body, m), "grouped_matmul_weights",
        jax.ShapeDtypeStruct((E, D, F), dtype), ("parallel", "parallel", "arbitrary"),
        grid_spec=grid,
    )(table.tile, table.expert, table.low, table.high, table.first, table.last, x_RxD, dy_RxF)


# Each row of expert e times w[e]; rows of no group become zero.
grouped_matmul = differentiable(
    lambda x, w, layout: rows_times("rows", [x], [w], layout),
    lambda dy, w, layout: rows_times("transposed", [dy], [w], layout), weight_gradient)
