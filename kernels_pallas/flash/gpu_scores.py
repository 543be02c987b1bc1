"""Scores of 64 queries and some keys on Hopper's tensor cores, their mask and their gradient."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.flash.gpu_plan import HALF, LOG2E, STEP, Plan
from kernels_pallas.flash.table import LATER

# One number for each row of a product's result, and for each column.
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
SHAPE = (HALF, STEP)


def spare(shape=SHAPE):
    """Shared memory for the left side of a product, where it is interpreted."""
    return [shape] if hopper.interpreted() else []


def product(a, b, shape=SHAPE, meanwhile=None):
    """Return a b^T of this shape in registers, 64 rows by those of b, after meanwhile()."""
    def of(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        if meanwhile:
            meanwhile()
        return acc[...]

    return pl.run_scoped(of, plgpu.ACC(shape, jnp.float32))


def scores(plan: Plan, raw):
    """Return scaled and capped scores to base 2, and for a cap the capped ones over it."""
    at = plan.position
    if at.softcap is None:
        return raw * (at.scale * LOG2E), None
    # the chip's own tanh has 11 bits, its exponential 22
    power = jnp.exp2(raw * (2 * LOG2E * at.scale / at.softcap))
    bent = 1 - 2 / (power + 1)
    return bent * (at.softcap * LOG2E), bent


def seen(plan: Plan, first, row, ends, own, others, by_key=False, shape=SHAPE):
    """Return which pairs see each other: queries by keys, or keys by queries.

    `first` is where query 0 stands and `row` the number of the first of these; `ends` where keys
    end, `own` and `others` the segments of queries and keys, or None.
    """
    may = in_reach(plan, first, row, ends, by_key, shape, plgpu.Layout.WGMMA)
    if plan.segmented:
        may = may & of_one(own, others, by_key, shape)
    return may


def in_reach(plan: Plan, first, row, ends, by_key, shape, layout):
    """Return which pairs see each other by their positions."""
    at, q, k = plan.position, int(by_key), int(not by_key)
    ends = hopper.spread(ends, shape, k)
    stands = plgpu.broadcasted_iota(jnp.int32, shape, q, layout=layout) + (first + row)
    may = ends <= stands if at.causal else ends != LATER
    if at.window is not None:
        may = may & (stands - ends < at.window)
    return may


def of_one(own, others, by_key, shape):
    """Return which pairs are of one segment."""
    q, k = int(by_key), int(not by_key)
    return hopper.spread(own, shape, q) == hopper.spread(others, shape, k)


def gradient(weights, d_weights, bent):
    """Return the gradient of the scores before scale, of weights and what their gradients exceed.

    d score = weight (d weight - delta), times the slope of the cap.
    """
    d = weights * d_weights
    return d if bent is None else d * (1 - bent * bent)
