"""Sorts (token, expert) pairs by expert, runs a function on the rows, and adds the results up.

Forward and backward are gathers only: a scatter-add is serial on CPU and unordered on GPU. One
static buffer of rows holds any load, so nothing is dropped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.rounding import narrow
from sparse_pretrain.sharding import ops


class Plan(NamedTuple):
    """Where every pair goes. Shapes: layout over R rows; row [T, C]; token, used [R]; seat [R]."""

    layout: ops.GroupLayout
    row: Int[Array, "T C"]  # R for a pair that is not dispatched
    pair: Int[Array, " R"]  # the pair t * C + c in this row
    used: Bool[Array, " R"]


def plan(expert_TxC: Int[Array, "T C"], experts: int) -> Plan:
    """The rows of every pair whose expert is below `experts`, grouped by expert, in token order."""
    T, C = expert_TxC.shape
    pairs = T * C
    expert_P = expert_TxC.reshape(-1)
    order = jnp.argsort(expert_P, stable=True).astype(jnp.int32)
    sorted_expert = expert_P[order]
    ends = jnp.searchsorted(sorted_expert, jnp.arange(experts, dtype=jnp.int32), side="right")
    ends = ends.astype(jnp.int32)
    sizes = jnp.diff(ends, prepend=0)
    first = ends - sizes
    layout = ops.group_layout(sizes, pairs=pairs)

    group = jnp.minimum(sorted_expert, experts - 1)
    row_sorted = layout.place(group, jnp.arange(pairs, dtype=jnp.int32) - first[group])
    row_sorted = jnp.where(sorted_expert < experts, row_sorted, layout.rows)
    row = jnp.zeros((pairs,), jnp.int32).at[order].set(row_sorted, unique_indices=True)

    starts, held = layout.runs()
    r = jnp.arange(layout.rows, dtype=jnp.int32)
    run = jnp.searchsorted(starts, r, side="right").astype(jnp.int32) - 1
    offset = r - starts[run]
    used = offset < held[run]
    before = jnp.concatenate([first, first + held[:experts]])
    pair = order[jnp.where(used, before[run] + offset, 0)]
    return Plan(layout, row.reshape(T, C), pair, used)


def _sum_seats(rows_RxD, plan_: Plan, weight_TxC=None):
    total: Any = None
    for c in range(plan_.row.shape[1]):
        row = plan_.row[:, c]
        # an undispatched pair reads row 0 with weight zero
        live = row < rows_RxD.shape[0]
        factor = live.astype(jnp.float32)
        if weight_TxC is not None:
            factor = factor * weight_TxC[:, c].astype(jnp.float32)
        part = rows_RxD[jnp.where(live, row, 0)].astype(jnp.float32) * factor[:, None]
        total = part if total is None else total + part
    return narrow(total, rows_RxD.dtype)


@jax.custom_vjp
def dispatch(x_TxD: Float[Array, "T D"], plan_: Plan) -> Float[Array, "R D"]:
    """Each pair's token in its row; a row without a pair holds some other token, read by nobody."""
    return x_TxD[plan_.pair // plan_.row.shape[1]]


dispatch.defvjp(
    lambda x, p: (dispatch(x, p), p),
    lambda p, d_rows: (_sum_seats(d_rows, p), None),
)


@jax.custom_vjp
def combine(
    rows_RxD: Float[Array, "R D"], weight_TxC: Float[Array, "T C"], plan_: Plan
) -> Float[Array, "T D"]:
    """Per token, the weighted sum of its pairs' rows, accumulated in float32."""
    return _sum_seats(rows_RxD, plan_, weight_TxC)


def _combine_forward(rows, weight, p):
    return combine(rows, weight, p), (rows, weight, p)


def _combine_backward(residuals, dy_TxD):
    rows, weight, p = residuals
    seats = weight.shape[1]
    # zero in rows without a pair: what grouped_linear asks of a cotangent
    scale = jnp.where(p.used, weight.reshape(-1)[p.pair], 0)
    wide = dy_TxD[p.pair // seats].astype(scale.dtype) * scale[:, None]
    d_rows = narrow(wide, rows.dtype)
    d_weight = []
    for c in range(seats):
        live = p.row[:, c] < rows.shape[0]
        part = rows[jnp.where(live, p.row[:, c], 0)].astype(jnp.float32)
        dot = jnp.sum(part * dy_TxD.astype(jnp.float32), axis=1)
        d_weight.append(jnp.where(live, dot, 0))
    return d_rows, jnp.stack(d_weight, axis=1).astype(weight.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
