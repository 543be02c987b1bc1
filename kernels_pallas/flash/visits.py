"""Which keys a block of queries is multiplied with, by position alone.

Key j ends at row j stride + span - 1 of the queries; marks may only push it later, so that what
is left out here is never seen. Numbers may be Python's or traced; letters as in pairs.py.
"""

from __future__ import annotations

import jax.numpy as jnp


def _ended(plan, row):
    """Return how many keys end at or before this row, below 0 and above S not cut off."""
    return (row - plan.span + 1) // plan.stride + 1


def _clip(x, low, high):
    if all(isinstance(n, int) for n in (x, low, high)):
        return max(low, min(x, high))
    return jnp.clip(x, low, high)


def keys(plan, start, stop, late=False):
    """Yield (start_k, stop_k, masked by position) for the queries [start, stop).

    `late`: keys may end later than their place says.
    """
    low, high = 0, plan.S
    first, last = start + plan.offset, stop - 1 + plan.offset
    if plan.causal:
        high = _clip(_ended(plan, last), 0, plan.S)
    if plan.window is not None and not late:
        low = max(0, _ended(plan, first - plan.window)) // 64 * 64  # keep rows aligned
    for a in range(low, high, plan.block_k):
        b = min(a + plan.block_k, high)
        masked = plan.causal and (late or b > _ended(plan, first))
        masked |= plan.window is not None and (late or a < _ended(plan, last - plan.window))
        yield a, b, masked


def ranges(plan, i, marked=False, latest_M=None, start=0):
    """Return (first, stop, masked) of key blocks for query block i: edge, inside, edge.

    `marked`: segments or given ends mask every block. `latest_M`: the last row at which a key of
    each block ends, where that is given and there is a window. `start` is added to the offset.
    """
    Q, U = plan.block_q, plan.block_k
    blocks = -(-plan.S // U)
    whole = plan.S // U  # blocks without padding
    first = i * Q + plan.offset + start
    last = first + Q - 1
    low, high, inside_low, inside_high = 0, blocks, 0, whole
    if plan.causal:
        high = _clip(-(-_ended(plan, last) // U), 0, blocks)
        inside_high = _clip(_ended(plan, first) // U, 0, whole)
    if plan.window is not None:
        if latest_M is None:
            low = _clip(_ended(plan, first - plan.window) // U, 0, high)
        else:
            near_M = jnp.append(latest_M > first - plan.window, True)
            low = _clip(jnp.argmax(near_M).astype(jnp.int32), 0, high)
        inside_low = _clip(-(-_ended(plan, last - plan.window) // U), low, high)
    if marked:
        return ((low, high, True),)
    inside_high = _clip(inside_high, inside_low, blocks)
    return (low, inside_low, True), (inside_low, inside_high, False), (inside_high, high, True)


def pairs_executed(plan, unrolled):
    """Return how many (query, key) pairs are multiplied, padding among them."""
    if unrolled:
        cuts = [(a, min(a + plan.block_q, plan.L)) for a in range(0, plan.L, plan.block_q)]
        return sum((b - a) * (d - c) for a, b in cuts for c, d, _ in keys(plan, a, b))
    blocks = [ranges(plan, i, True)[0] for i in range(-(-plan.L // plan.block_q))]
    return sum(stop - first for first, stop, _ in blocks) * plan.block_q * plan.block_k
