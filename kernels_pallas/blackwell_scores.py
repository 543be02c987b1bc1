"""Scores, weights and sums of Blackwell's kernels of attention, in tensor memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper

ROWS, STEP = 128, 64  # of the scores that are multiplied at once
# Columns of them that are computed at once: a thread has numbers of columns beside them, such as
# what masks keys; with those of all 64 columns 520 bytes were spilled.
PIECE = 32
PIECES = range(0, STEP, PIECE)
SHAPE = (ROWS, PIECE)
LAYOUT = plgpu.Layout.TCGEN05
ROW, COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)
PART = 64  # columns of a sum that registers hold at once
_COLUMNS = 512  # of tensor memory, of 4 bytes each


def fits(*, scores, weights, sums, apart) -> bool:
    """Return whether tensor memory has room for so many places, and sums of these widths."""
    return 2 * (scores * STEP + weights * STEP // 2) + (1 + apart) * sum(sums) <= _COLUMNS


@dataclasses.dataclass(frozen=True)
class Memory:
    """Tensor memory and its barriers: two places of scores and of weights, and sums of `widths`.

    A place is scored by the products of its scores and ready when its weights are stored, which a
    computing warpgroup does when it has read the scores. Products are done in the order in which
    they were issued, so that the next scores of a place tell that its weights may be stored anew,
    and its warpgroup's sum be scaled.
    """

    scores: Sequence[Any]
    weights: Sequence[Any]
    sums: Sequence[Any]
    scored: Any
    ready: Any
    summed: Any
    taken: Any
    widths: Sequence[int]
    apart: bool

    def sum(self, place, n):
        """Return a sum [ROWS, width]; of the two that are `apart` the one of this place."""
        width = self.widths[n]
        return self.sums[n].at[:, pl.ds((place if self.apart else 0) * width, width)]

    def scale(self, place, n, factor):
        """Multiply the rows of a sum that no product adds to."""
        whole = self.sum(place, n)
        for column in range(0, self.widths[n], PART):
            part = whole.at[:, pl.ds(column, PART)]
            values = plgpu.async_load_tmem(part, layout=LAYOUT)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(part, values * hopper.spread(factor, values.shape, 0))

    def take(self, place, some, n, column, width):
        """Return some columns of a sum, zeros unless `some` steps were added up."""
        values = plgpu.async_load_tmem(self.sum(place, n).at[:, pl.ds(column, width)],
                                       layout=LAYOUT)
        some = lax.broadcast_in_dim(some, values.shape, ())
        return jnp.where(some != 0, values, jnp.zeros_like(values))


def unseen(top):
    """Return the largest score and the denominator of rows before any step."""
    return tuple(plgpu.layout_cast(jnp.full(ROWS, x, jnp.float32), ROW) for x in (top, 0))


def soften(own, old, top, pieces, keep, later):
    """Store the weights of a step's scores to base 2, and scale the sum of steps before, if any.

    `old` is (largest score, denominator) before, `top` the largest now; returns the new ones.
    """
    shrink = jnp.exp2(old[0] - top)
    total = old[1] * shrink
    for column, found in zip(PIECES, pieces, strict=True):
        weights = jnp.exp2(found - hopper.spread(top, SHAPE, 0))
        total = total + weights.sum(axis=1)
        keep(0, column, weights)
    pl.when(later)(lambda: own.scale(0, shrink))
    return top, total


def place_of(ref, place):
    """Return the columns of a place of scores or weights."""
    return ref.at[:, pl.ds(place * STEP, STEP)]


def piece_of(ref, place, column):
    """Return PIECE columns of a place."""
    return ref.at[:, pl.ds(place * STEP + column, PIECE)]


def cut(numbers, column):
    """Return those of a step's numbers that belong to a piece."""
    return numbers.at[pl.ds(column, PIECE)]


def memory_of(scores, weights, sums, apart):
    """Return the scratch of a Memory: its first seven fields."""
    assert fits(scores=scores, weights=weights, sums=sums, apart=apart), (scores, weights, sums)
    return ([plgpu.TMEM((ROWS, 2 * STEP), jnp.float32)] * scores,
            [plgpu.TMEM((ROWS, 2 * STEP), jnp.bfloat16, packed=True)] * weights,
            [plgpu.TMEM((ROWS, (1 + apart) * width), jnp.float32) for width in sums],
            barrier(1, 2), barrier(1, 2), barrier(1, 1), barrier(2, 1))


def barrier(arrivals, count):
    """Return barriers that products, too, wait for or arrive at."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count, orders_tensor_core=True)
