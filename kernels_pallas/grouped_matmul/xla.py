"""grouped_matmul for XLA without `jax.lax.ragged_dot`, which does E times the work on CPU.

Even loads run as one batched matmul over [E, seats, D]; uneven ones as a loop over the blocks in
use, each with one expert, wide blocks where they fit. No gather of all weights, no temporary larger
than the result.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear.xla import contract_rows, split_rows

_f32 = jnp.float32
# Bytes of experts' matrices that one batched product in the loop copies: what stays in the cache.
# 8 blocks of 512 x 512 in bfloat16 run 1.2 times as fast as 16 of them, 4 of 1024 x 512 1.4 times.
_COPIED = 1 << 22
# Rows of one group that the weight gradient contracts at once: each chunk reads and writes the
# group's gradient, and a contraction of 128 rows runs at half the rate of one of 512.
_CHUNK = 512


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (max(n, 1).bit_length() - 1)


def _blocks(layout, block):
    """(number of blocks in use, blocks -> their experts), for groups end to end in whole blocks."""
    ends = jnp.cumsum((layout.sizes + (block - 1)) // block)

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
    experts = w.shape[0]

    def even(x, w):
        spec = "ecf,edf->ecd" if transposed else "ecd,edf->ecf"
        y = jnp.einsum(spec, x.reshape(experts, layout.seats, -1), w, preferred_element_type=asked)
        return y.reshape(-1, out_width)

    def ragged(block, x, w):
        # groups lie end to end in whole blocks, so block i starts at row i * block
        count, experts_of = _blocks(layout, block)
        total = layout.rows // block
        at_once = _at_once(w[0].size, w.dtype.itemsize, total)

        def body(i, out):
            first = jnp.minimum(i * at_once, total - at_once)
            expert = experts_of(first + jnp.arange(at_once, dtype=jnp.int32))
            rows = jax.lax.dynamic_slice_in_dim(x, first * block, at_once * block)
            spec = "bcf,bdf->bcd" if transposed else "bcd,bdf->bcf"
            y = jnp.einsum(
                spec, rows.reshape(at_once, block, -1), w[expert], preferred_element_type=asked
            )
            y = y.reshape(at_once * block, out_width)
            return jax.lax.dynamic_update_slice_in_dim(out, y, first * block, 0)

        zeros = jnp.zeros((layout.rows, out_width), dtype)
        return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, body, zeros)

    return _by_load(layout, even, ragged, x, w)


def _by_load(layout, even, ragged, *args):
    """`even` of even loads, `ragged` with the rows of a block of others."""

    def uneven(*args):
        narrow = functools.partial(ragged, layout.block)
        if not layout.wide:
            return narrow(*args)
        return jax.lax.cond(layout.broad, functools.partial(ragged, layout.wide), narrow, *args)

    return jax.lax.cond(layout.uniform, even, uneven, *args)


def _weight_gradient(x, dy, layout, experts, dtype):
    """sum over each expert's rows of x^T dy, float32."""

    def even(x, dy):
        chunks = split_rows(layout.seats)
        x = x.reshape(experts, chunks, -1, x.shape[1])
        dy = dy.reshape(experts, chunks, -1, dy.shape[1])
        return jnp.einsum("ebcd,ebcf->edf", x, dy, preferred_element_type=_f32).astype(dtype)

    def ragged(block, x, dy):
        of_blocks = _of_wide_blocks if block == layout.wide else _of_chunks
        return of_blocks(x, dy, layout, experts).astype(dtype)

    return _by_load(layout, even, ragged, x, dy)


def _of_wide_blocks(x, dy, layout, experts):
    """The gradient from wide blocks, each of one expert; rows of no group have dy zero."""
    block = layout.wide
    count, experts_of = _blocks(layout, block)
    total = layout.rows // block
    at_once = _at_once(x.shape[1] * dy.shape[1], 4, total)

    def body(i, dw):
        first = jnp.minimum(i * at_once, total - at_once)
        number = first + jnp.arange(at_once, dtype=jnp.int32)

        def blocks(rows):
            rows = jax.lax.dynamic_slice_in_dim(rows, first * block, at_once * block)
            # contracted over two dims, as in `contract_rows`
            return rows.reshape(at_once, 2, block // 2, -1)

        rows = blocks(x), blocks(dy)
        part = jnp.einsum("nbcd,nbcf->ndf", *rows, preferred_element_type=_f32)
        new = (number >= i * at_once) & (number < count)  # the last turn may reach back
        part = jnp.where(new[:, None, None], part, 0)
        return dw.at[experts_of(number)].add(part, indices_are_sorted=True)

    zeros = jnp.zeros((experts, x.shape[1], dy.shape[1]), _f32)
    return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, body, zeros)


def _of_chunks(x, dy, layout, experts):
    """The gradient from chunks of rows, every group in its own, the last padded with zeros."""
    chunk = min(max(_power_of_two(layout.rows // experts), layout.block), _CHUNK, layout.rows)
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
