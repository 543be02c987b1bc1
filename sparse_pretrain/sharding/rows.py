"""Rows of a table that lies in parts: numbers travel to them, and what they find comes back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sparse_pretrain.sharding import apply


def lookup(table: Any, rows_BxLxA: Any, dims: tuple[str, str], dtype: Any) -> Any:
    """The rows of these numbers, in `dtype`; the table's gradient is added up in its own.

    Each device looks up what it holds for all tokens of those that share its part, and adds what
    they find: of all parts one holds a row, so the sum is that row to the bit. What travels grows
    with the number of parts.
    Shapes: table [Row, Dm], rows [B, L, A] -> [B, L, A, Dm].
    """
    placed = apply.current()
    if placed is None:
        return table[rows_BxLxA].astype(dtype)
    B, L, _ = rows_BxLxA.shape
    names = (*placed.parameter(dims, table.shape), None, None)[:2]
    assert names[1] is None, f"{dims}: rows are cut, {names[1]} cuts what they hold"
    held = names[0] if isinstance(names[0], tuple) else (names[0],) if names[0] else ()
    cut = placed.cut("B", B), placed.cut("L", L)

    def local(table, rows):
        # the innermost axis first, so that tokens come in their order
        for dim, axes in enumerate(cut):
            for axis in reversed([a for a in axes if a in held]):
                rows = jax.lax.all_gather(rows, axis, axis=dim, tiled=True)
        part = 0
        for axis in held:
            part = part * placed.sizes[axis] + jax.lax.axis_index(axis)
        size = table.shape[0]
        at = rows - part * size
        here = (at >= 0) & (at < size)
        found = table[jnp.clip(at, 0, size - 1)].astype(dtype)
        found = jnp.where(here[..., None], found, jnp.zeros((), dtype))
        for axis in held:
            if axis not in (*cut[0], *cut[1]):  # all its devices have these tokens
                found = jax.lax.psum(found, axis)
        for dim, axes in enumerate(cut):  # back in the opposite order
            for axis in (a for a in axes if a in held):
                found = jax.lax.psum_scatter(found, axis, scatter_dimension=dim, tiled=True)
        return found

    tokens = [apply.entry(axes) for axes in cut]
    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(apply.entry(held)), PartitionSpec(*tokens)),
        out_specs=PartitionSpec(*tokens),
        axis_names=set(placed.mesh.axis_names) - placed.manual,
        check_vma=False,
    )(table, rows_BxLxA)
