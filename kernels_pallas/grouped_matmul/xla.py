"""grouped_matmul for XLA without `jax.lax.ragged_dot`, which does E times the work on CPU.

What experts have at home runs as one batched matmul over [E, home, D]; what lies beyond, as a loop
over the blocks in use, each with one expert. No gather of all weights, no temporary larger than the
result.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.layout import power_of_two
from kernels_pallas.linear.xla import contract_rows, split_rows

_f32 = jnp.float32
# Bytes of experts' matrices that one batched product in the loop copies: what stays in the cache.
# 8 blocks of 512 x 512 in bfloat16 run 1.2 times as fast as 16 of them, 4 of 1024 x 512 1.4 times.
_COPIED = 1 << 22
# Rows of one group that the weight gradient contracts at once: each chunk reads and writes the
# group's gradient, and a contraction of 128 rows runs at half the rate of one of 512.
_CHUNK = 512


def _blocks(layout, home, block):
    """(number of blocks in use, blocks -> their experts), of what lies beyond the homes."""
    beyond = jnp.maximum(layout.sizes - home, 0)
    ends = jnp.cumsum((beyond + (block - 1)) // block)

    def experts(i):
        expert = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        return jnp.minimum(expert, layout.sizes.shape[0] - 1)

    return ends[-1], experts


def _at_once(width, itemsize, blocks):
    """How many of `blocks` a turn of the loop multiplies: few leave cores idle, many gain nothing.

    As many each turn as there are turns for all of them, so that the last does as much as the rest.
    """
    most = min(max(_COPIED // (width * itemsize), 4), 32, blocks)
    return -(-blocks // -(-blocks // most))


def rows_times(x, w, layout, *, transposed=False, dtype=None):
    """x times each expert's w (or its transpose), for both layouts, in x's dtype if not in dtype.

    Shapes: x [R, D], w [E, D, F] ([E, F, D] transposed) -> [R, F]; rows of no group: anything.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    asked = None if dtype == x.dtype else dtype
    out_width = w.shape[1] if transposed else w.shape[2]

    def times(rows, w):  # [n, rows, :] times n matrices
        spec = "ncf,ndf->ncd" if transposed else "ncd,ndf->ncf"
        return jnp.einsum(spec, rows, w, preferred_element_type=asked).reshape(-1, out_width)

    def run(home, block, x, w):
        first = w.shape[0] * home
        near = times(x[:first].reshape(w.shape[0], home, -1), w) if home else None
        if first == layout.rows:
            return near
        out = jnp.zeros((layout.rows - first, out_width), dtype)
        out = out if near is None else jnp.concatenate([near, out])
        count, experts_of = _blocks(layout, home, block)
        total = (layout.rows - first) // block
        at_once = _at_once(w[0].size, w.dtype.itemsize, total)

        def body(i, out):
            number = jnp.minimum(i * at_once, total - at_once)
            expert = experts_of(number + jnp.arange(at_once, dtype=jnp.int32))
            start = first + number * block
            rows = jax.lax.dynamic_slice_in_dim(x, start, at_once * block)
            y = times(rows.reshape(at_once, block, -1), w[expert])
            return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

        return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, body, out)

    return _by_load(layout, run, x, w)


def _by_load(layout, run, *args):
    """`run` with the home and block of the path that the loads have taken."""
    branches = [functools.partial(run, *path) for path in layout.paths]
    if len(branches) == 1:
        return branches[0](*args)
    return jax.lax.switch(layout.path, branches, *args)


def _weight_gradient(x, dy, layout, experts, dtype):
    """sum over each expert's rows of x^T dy, in float32 until the end."""

    def run(home, block, x, dy):
        if not home:
            return _of_chunks(x, dy, layout, experts).astype(dtype)
        first, chunks = experts * home, split_rows(home)
        rows = (a[:first].reshape(experts, chunks, -1, a.shape[1]) for a in (x, dy))
        dw = jnp.einsum("nbcd,nbcf->ndf", *rows, preferred_element_type=_f32)
        return (_of_blocks(x, dy, dw, layout, home, block) if block else dw).astype(dtype)

    return _by_load(layout, run, x, dy)


def _of_blocks(x, dy, dw, layout, home, block):
    """dw with the blocks beyond the homes, each of one expert; rows of no group have dy zero."""
    count, experts_of = _blocks(layout, home, block)
    start = dw.shape[0] * home
    total = (layout.rows - start) // block
    at_once = _at_once(x.shape[1] * dy.shape[1], 4, total)

    def body(i, dw):
        first = jnp.minimum(i * at_once, total - at_once)
        number = first + jnp.arange(at_once, dtype=jnp.int32)

        def blocks(rows):
            rows = jax.lax.dynamic_slice_in_dim(rows, start + first * block, at_once * block)
            # contracted over two dims, as in `contract_rows`
            return rows.reshape(at_once, 2, block // 2, -1)

        rows = blocks(x), blocks(dy)
        part = jnp.einsum("nbcd,nbcf->ndf", *rows, preferred_element_type=_f32)
        new = (number >= i * at_once) & (number < count)  # the last turn may reach back
        part = jnp.where(new[:, None, None], part, 0)
        return dw.at[experts_of(number)].add(part, indices_are_sorted=True)

    return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, body, dw)


def _of_chunks(x, dy, layout, experts):
    """The gradient from chunks of rows, every group in its own, the last padded with zeros."""
    chunk = min(max(power_of_two(layout.rows // experts), layout.block), _CHUNK, layout.rows)
    per_group = (layout.sizes + (chunk - 1)) // chunk
    ends = jnp.cumsum(per_group)
    offset = jnp.arange(chunk, dtype=jnp.int32)

    def body(i, dw):
        expert = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        first = (i - (ends - per_group)[expert]).astype(jnp.int32) * chunk
        wanted = layout.starts[expert] + first
        start = jnp.minimum(wanted, layout.rows - chunk)  # no chunk leaves the buffer
        row = start + offset
        mine = (row >= wanted) & (row < layout.starts[expert] + layout.sizes[expert])
        rows = jax.lax.dynamic_slice_in_dim(x, start, chunk)
        rows = jnp.where(mine[:, None], rows, jnp.zeros((), rows.dtype))
        part = contract_rows(rows, jax.lax.dynamic_slice_in_dim(dy, start, chunk), _f32)
        total = jax.lax.dynamic_index_in_dim(dw, expert, keepdims=False) + part
        return jax.lax.dynamic_update_index_in_dim(dw, total, expert, 0)

    zeros = jnp.zeros((experts, x.shape[1], dy.shape[1]), _f32)
    return jax.lax.fori_loop(0, ends[-1], body, zeros)


@jax.custom_vjp
def grouped_matmul(x, w, layout):
    """Each row of expert e times w[e], in x's dtype."""
    return rows_times(x, w.astype(x.dtype), layout)


def _forward(x, w, layout):
    return grouped_matmul(x, w, layout), (x, w, layout)


def _backward(residuals, dy):
    x, w, layout = residuals
    dy = dy.astype(x.dtype)
    dx = rows_times(dy, w.astype(x.dtype), layout, transposed=True)
    dw = _weight_gradient(x, dy, layout, w.shape[0], w.dtype)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)
