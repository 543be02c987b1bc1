"""Queries by chunks against a table of tokens that they list: what the kernels of chips share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import rows


def table(plan, kv):
    """Return the tokens of the batch end to end and a row of zeros, as wide as in memory."""
    return jnp.pad(rows.laid(kv), ((0, 0), (0, plan.D - plan.Dk)))


def scan(plan, step, carry, xs):
    """Go through the queries [B, L, ...] by chunks; results are [B, L, ...]."""
    xs = [rows.in_chunks(x, plan.chunk, fill) for x, fill in xs]
    if xs[0].shape[0] == 1:  # no loop to compile
        carry, out = step(carry, [x[0] for x in xs])
        out = jax.tree.map(lambda x: x[None], out)
    else:
        carry, out = lax.scan(step, carry, xs)
    return carry, jax.tree.map(lambda x: rows.out_of_chunks(x, plan.B, plan.L), out)
