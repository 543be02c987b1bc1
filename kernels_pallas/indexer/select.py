"""The numbers of the largest of many scores: exactly, and without a sort.

Scores become integers in the same order, and the k-th largest is found bit by bit, by counting how
many are at least so large; then the places of those that are become bits of words, and the j-th set
bit of a row is found by counting. Long rows are first narrowed to the k groups of SLAB neighbours
of the largest best member, which hold the k best. Every step is a comparison or a sum along whole
arrays, which any platform vectorises.

So that groups of neighbours are taken apart by vectors too, scores lie in slabs: `spread` gives the
order of keys. Letters beside the house's: Q rows, W words (groups) of I keys; key w x I + i of a
row lies at [i, w].
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

# Keys of a word, and of a group of a long row.
SLAB = 16
# Rows of so many keys for each that is chosen are narrowed first. Counting costs 48 comparisons of
# every key; narrowing costs as many of a sixteenth of them, and of sixteen for each that is chosen.
LONG = 48


def levels(keys, top):
    """Return into how many levels of words the keys of a row are cut, 1 or 2."""
    return 2 if keys >= LONG * top else 1


def flops(keys, top):
    """Return what the products of `_sums` cost for a query with so many keys. Units: FLOPs."""
    size = SLAB ** levels(keys, top)
    words = [-(-keys // size) * size // SLAB]
    if levels(keys, top) == 2:
        words = [words[0] // SLAB, top]
    rows = [-(-w // SLAB) for w in words]
    return sum(2 * 2 * (r * SLAB * SLAB + r * r) for r in rows)  # two of them for each choice


def spread(x, dim, levels, fill=0):
    """Return x with the keys along dim padded to whole words and laid in slabs."""
    size = SLAB**levels
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % size)
    x = jnp.pad(x, widths, constant_values=fill)
    cut = x.reshape(*x.shape[:dim], -1, *(SLAB,) * levels, *x.shape[dim + 1:])
    order = (*range(dim), *reversed(range(dim, dim + levels + 1)),
             *range(dim + levels + 1, cut.ndim))
    return cut.transpose(order).reshape(x.shape)


def _ordered(scores):
    """Return integers in the order of the scores; -0 is 0."""
    integer = jnp.dtype(jnp.int64 if scores.dtype == jnp.float64 else jnp.int32)
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), scores)
    bits = lax.bitcast_convert_type(scores, integer)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def _kth(keys_QxIxW, k):
    """Return the largest number that at least k keys of a row reach [Q]; the least where none is.

    Two bits at a time, so that what is compared with three numbers is read once, into one sum.
    """
    dtype = keys_QxIxW.dtype
    bits = dtype.itemsize * 8
    shifts = (0, 10, 20)  # a field of a sum holds up to SLAB

    def step(i, low):
        unit = jnp.left_shift(jnp.ones((), dtype), (bits - 2 - 2 * i).astype(dtype))
        bars = [(low + unit * n)[:, None] for n in (1, 2, 3)]
        reached = [jnp.where(_slab(keys_QxIxW, i) >= bar, jnp.int32(1 << shift), 0)
                   for i in range(SLAB) for bar, shift in zip(bars, shifts, strict=True)]
        packed = lax.optimization_barrier(sum(reached[1:], reached[0]))
        more = jnp.zeros_like(low)
        for shift in shifts:
            count = jnp.sum((packed >> shift) & (2 * SLAB - 1), axis=1, dtype=jnp.int32)
            more += (count >= k).astype(dtype)
        return low + more * unit

    low = jnp.full(keys_QxIxW.shape[:1], jnp.iinfo(dtype).min, dtype)
    return lax.fori_loop(jnp.int32(0), jnp.int32(bits // 2), step, low)


def _slab(x_QxIxW, i):
    return lax.index_in_dim(x_QxIxW, i, 1, keepdims=False)


# Written out over a slab's members: XLA:CPU vectorises neither a reduction whose operand it fuses
# nor one along a dim that is not the last.


def _words(mask_QxIxW):
    """Return [Q, W] with bit i set where [i, w] is."""
    parts = [jnp.where(_slab(mask_QxIxW, i), jnp.int32(1 << i), 0) for i in range(SLAB)]
    return functools.reduce(jnp.bitwise_or, parts)


def _set_up_to(bits, i):
    """Return how many of the bits 0 to i are set."""
    return lax.population_count(bits & ((2 << i) - 1))


def _lowest(bits, count):
    """Return the lowest `count` of the bits that are set."""
    kept = jnp.zeros_like(bits)
    for i in range(SLAB):
        kept |= jnp.where(_set_up_to(bits, i) <= count, bits & (1 << i), 0)
    return kept


def _sums(x_QxW):
    """Return the sums of small numbers up to each, by products with triangles of ones."""
    Q, W = x_QxW.shape
    x = jnp.pad(x_QxW, ((0, 0), (0, -W % SLAB))).astype(jnp.float32).reshape(Q, -1, SLAB)

    def triangle(n, least):
        return jnp.asarray(np.arange(n)[None] - np.arange(n)[:, None] >= least, jnp.float32)

    inside = jnp.einsum("qcw,wv->qcv", x, triangle(SLAB, 0))
    before = jnp.einsum("qc,cd->qd", inside[:, :, -1], triangle(x.shape[1], 1))
    return (inside + before[:, :, None]).reshape(Q, -1)[:, :W].astype(jnp.int32)


def _after(ends_QxW, nth_1xN):
    """Return how many of the rising numbers of a row are at most n, [Q, N], W - 1 for all."""
    W = ends_QxW.shape[1]
    found = jnp.zeros((len(ends_QxW), nth_1xN.shape[1]), jnp.int32)
    for w in range(SLAB - 1, W - 1, SLAB):
        found += jnp.where(ends_QxW[:, w, None] <= nth_1xN, SLAB, 0)
    step = SLAB // 2
    while step:
        found = lax.optimization_barrier(found)
        at = jnp.minimum(found + (step - 1), W - 1)
        found += jnp.where(jnp.take_along_axis(ends_QxW, at, axis=1) <= nth_1xN, step, 0)
        step //= 2
    return jnp.minimum(found, W - 1)


def _pick(keys_QxIxW, k, never):
    """Return (word, bit) [Q, k] of the k largest keys above `never`, by rising number, and a mask.

    Of equal ones the lower numbers are taken.
    """
    bar = _kth(keys_QxIxW, k)[:, None, None]
    above = lax.optimization_barrier(_words(keys_QxIxW > bar))
    equal = lax.optimization_barrier(_words((keys_QxIxW == bar) & (bar > never)))
    spare = k - jnp.sum(lax.population_count(above), axis=1, dtype=jnp.int32, keepdims=True)
    counts = lax.population_count(equal)
    bits = above | _lowest(equal, spare - (_sums(counts) - counts))
    bits = lax.optimization_barrier(bits)
    counts = lax.population_count(bits)
    ends = lax.optimization_barrier(_sums(counts))
    nth = jnp.arange(k, dtype=jnp.int32)[None]
    word = lax.optimization_barrier(_after(ends, nth))
    own, start = (lax.optimization_barrier(jnp.take_along_axis(x, word, axis=1))
                  for x in (bits, ends - counts))
    place = jnp.zeros_like(own)
    for i in range(SLAB):
        place += (_set_up_to(own, i) <= nth - start).astype(jnp.int32)
    return *lax.optimization_barrier((word, place)), nth < ends[:, -1:]


def largest(scores_QxS, top, levels):
    """Return the numbers of the `top` largest scores of each row above -inf, -1 for none: [Q, top].

    Rising, so that of those that follow one another memory is read in order; of equal scores the
    lower numbers are taken.

    Shapes: scores in the order of `spread`.
    """
    Q = len(scores_QxS)
    keys = lax.optimization_barrier(_ordered(scores_QxS))
    never = _ordered(jnp.full((), -jnp.inf, scores_QxS.dtype))
    if levels == 1:
        word, place, some = _pick(keys.reshape(Q, SLAB, -1), top, never)
        return jnp.where(some, word * SLAB + place, -1)
    keys = keys.reshape(Q, SLAB, -1)  # a group's members by its number, those in slabs again
    best = functools.reduce(jnp.maximum, (_slab(keys, i) for i in range(SLAB)))
    best = lax.optimization_barrier(best.reshape(Q, SLAB, -1))
    word, place, some = _pick(best, top, never)
    group = jnp.where(some, place * best.shape[2] + word, 0)
    held = jnp.take_along_axis(keys, group[:, None, :], axis=2)
    held = lax.optimization_barrier(jnp.where(some[:, None, :], held, never))
    number = word * SLAB + place
    slot, place, some = _pick(held, top, never)
    return jnp.where(some, jnp.take_along_axis(number, slot, axis=1) * SLAB + place, -1)
