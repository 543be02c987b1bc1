"""Scores of a step's keys and a tile's queries on a TPU, their mask, and how arrays lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tpu
from kernels_pallas.flash.pairs import MASKED
from kernels_pallas.flash.table import LATER, Table
from kernels_pallas.flash.tpu_plan import COLUMNS, Plan

# In a kernel.


def ends_of_tile(mine, z):
    """Return whether a visit is its tile's first, and whether it is the last."""
    first = (z == 0) | (mine[z] != mine[jnp.maximum(z - 1, 0)])
    return first, mine[z] != mine[z + 1]


def scores(plan: Plan, q, k):
    """Return scaled and capped scores [n, t], and for a cap the capped ones over it."""
    at = plan.position
    found = tpu.dot(k[...], q[...], (1, 1)) * at.scale
    if at.softcap is None:
        return found, None
    bent = jnp.tanh(found / at.softcap)
    return bent * at.softcap, bent


def seen(plan: Plan, own, others):
    """Return which keys [n, t] each query sees: `own` [2, t] of queries, `others` [COLUMNS, n]."""
    at = plan.position
    stands = own[0:1, :]
    columns = others[...].T
    ends = columns[:, 0:1]
    may = ends <= stands if at.causal else jnp.broadcast_to(ends != LATER, (
        ends.shape[0], stands.shape[1]))
    if at.window is not None:
        may = may & (ends > stands - at.window)
    if plan.segmented:
        may = may & (columns[:, 1:2] == own[1:2, :])
    return may


def either(plan: Plan, plain, add):
    """Run add(masked), without a mask where none touches the visit."""
    if plan.marked:
        add(True)
        return

    @pl.when(plain == 1)
    def _():
        add(False)

    @pl.when(plain == 0)
    def _():
        add(True)


def weights_and_gradients(plan: Plan, masked, q, k, v, do, own, others, numbers):
    """Return weights [n, t], and the gradients of the scores before scale."""
    found, bent = scores(plan, q, k)
    if masked:
        found = jnp.where(seen(plan, own, others), found, MASKED)
    weights = jnp.exp(found - numbers[0:1, :])
    d = weights * (tpu.dot(v[...], do[...], (1, 1)) - numbers[1:2, :])
    return weights, d if bent is None else d * (1 - bent * bent)


# Around the kernels.


class Laid(NamedTuple):
    """What masks, as it lies in memory: own [B x tiles, 2, t], others [B x steps, COLUMNS, n]."""

    table: Table
    own: Any
    others: Any
    sizes: tuple[int, int]


def lay(plan: Plan, table: Table) -> Laid:
    """Return what masks of a call's table: where queries stand, where keys end, and segments."""
    t, n = plan.position.block_q, plan.position.block_k
    stands = jnp.broadcast_to(table.first + jnp.arange(plan.L, dtype=jnp.int32), table.own.shape)
    own = jnp.stack([x.reshape(-1, t) for x in (stands, table.own)], 1)
    others = jnp.stack([x.reshape(-1, n) for x in (table.ends, table.others)], 1)
    others = jnp.pad(others, ((0, 0), (0, COLUMNS - 2), (0, 0)))
    return Laid(table, own, others, (t, n))


def heads_first(x_BxLxHxD, rows, width):
    """Return [H, B x rows, width], filled up with zeros."""
    B, L, H, D = x_BxLxHxD.shape
    x = jnp.pad(x_BxLxHxD.transpose(2, 0, 1, 3), ((0, 0), (0, 0), (0, rows - L), (0, width - D)))
    return x.reshape(H, B * rows, width)


def heads_back(x_HxRxD, B):
    """Undo it, but for what was filled up: [B, rows, H, D]."""
    H, R, D = x_HxRxD.shape
    return x_HxRxD.reshape(H, B, R // B, D).transpose(1, 2, 0, 3)


def numbers(plan: Plan, less_BxLxH, delta_BxLxH):
    """Return what the gradients subtract, by tile: [H, B x tiles, 2, t]."""
    rows = ((0, 0), (0, 0), (0, plan.L - less_BxLxH.shape[1]))
    both = [jnp.pad(x.transpose(2, 0, 1), rows, constant_values=fill)
            for x, fill in ((less_BxLxH, -MASKED), (delta_BxLxH, 0))]
    t = plan.position.block_q
    return jnp.stack([x.reshape(plan.H, -1, t) for x in both], 2)
