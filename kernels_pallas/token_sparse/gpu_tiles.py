"""What Hopper's kernels over listed tokens share: queries as rows of tiles, lists in their order.

Used by token_sparse and by the indexer's divergence over listed keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import hopper
from kernels_pallas.token_sparse.gpu_plan import HALF, Plan


def over_tiles(plan: Plan, attend, by_row, keyed, outs, **keywords):
    """Call `attend` for every pair of queries, each warpgroup with a query's rows and tokens."""
    tiles = jnp.arange(plan.tiles, dtype=jnp.int32)
    used = jnp.full(1, plan.tiles, jnp.int32)
    return hopper.over_tiles(attend, by_row, keyed, outs, steps=plan.steps, step_rows=hopper.X,
                             group=tiles, used=used, split=True, kept=plan.kept, **keywords)


def result(plan: Plan, rest, dtype, by_step=False):
    """Return the shape of a result by row that is kept, or by token of the lists."""
    n = plan.tiles * (plan.steps * hopper.X if by_step else 2 * plan.kept)
    return jax.ShapeDtypeStruct((n, *rest), dtype)


def by_tile(plan: Plan, x, fill=0):
    """Return [chunk, H, ...] as the rows of tiles, filled up: 128 of a pair, 64 of a set."""
    widths = ((0, plan.pair * plan.tiles - x.shape[0]), (0, plan.sets * HALF - plan.H),
              *((0, plan.D - d) for d in x.shape[2:]))
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(-1, *x.shape[2:])


def of_tiles(plan: Plan, x):
    """Return results [queries of tiles x kept, ...] by query: [chunk, H, ...]."""
    return x.reshape(-1, plan.kept, *x.shape[1:])[:plan.chunk, :plan.H]


def in_steps(plan: Plan, at):
    """Return the lists [chunk, N] in the order of the kernels: tile, step, query, token."""
    widths = ((0, plan.pair * plan.tiles - at.shape[0]), (0, plan.steps * HALF - plan.N))
    at = jnp.pad(at, widths, constant_values=plan.B * plan.S)
    return at.reshape(plan.tiles, plan.pair, plan.steps, HALF).swapaxes(1, 2).reshape(-1)


def of_steps(plan: Plan, x):
    """Undo it: [chunk, N]."""
    x = x.reshape(plan.tiles, plan.steps, plan.pair, HALF).swapaxes(1, 2)
    return x.reshape(plan.pair * plan.tiles, -1)[:plan.chunk, :plan.N]
