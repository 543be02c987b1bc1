"""One softmax over several sets of keys, each read in a way of its own.

Parts are merged by the logarithms of their denominators. Only the merged o and lse are kept: with
them the weights of a part are those of the whole softmax, so that its backward pass needs neither
what it gave alone nor a gradient of that, which the merging of complete ops would keep for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.block_sparse import op as block_sparse_op
from kernels_pallas.block_sparse import xla as block_xla
from kernels_pallas.flash import op as flash_op
from kernels_pallas.flash import own
from kernels_pallas.flash import xla as flash_xla
from kernels_pallas.op import Op
from kernels_pallas.rounding import narrow
from kernels_pallas.token_sparse import op as token_sparse_op
from kernels_pallas.token_sparse import xla as token_xla


class Way(NamedTuple):
    """How keys are read. `forward(q, arrays, **options)` returns (o, lse).

    `gradients(q, arrays, do, lse, delta, **options)` returns dq and those of the arrays, {name:
    gradient}, where lse and delta are of the whole softmax. Without an `op` XLA alone has it.
    """

    forward: Callable[..., Any]
    gradients: Callable[..., Any]
    op: Op | None = None


class Part(NamedTuple):
    """Keys and how they are read: a name of WAYS, its arrays (None for one left out), options."""

    way: str
    arrays: dict[str, Any]
    options: dict[str, Any]


def _flash(q, arrays, **options):
    more = {name: x for name, x in arrays.items() if name not in ("k", "v")}
    return flash_xla.flash(q, arrays["k"], arrays["v"], **more, **options, return_lse=True)


def _flash_gradients(q, arrays, do, lse, delta, **options):
    more = {name: x for name, x in arrays.items() if name not in ("k", "v", "sinks_H")}
    dq, dk, dv = flash_xla.part_gradients(
        q, arrays["k"], arrays["v"], do, lse, delta, **more, **options, dtype=q.dtype)
    found, sinks = {"k": dk, "v": dv}, arrays.get("sinks_H")
    if sinks is not None:
        weight = jnp.exp(sinks.astype(lse.dtype)[None, None] - lse)
        found["sinks_H"] = -jnp.sum(weight * delta, axis=(0, 1))
    return dq, found


_OWN_BLOCK = ("k", "v", "ids_q", "ids_k")


def _own_block(q, arrays, **options):
    return own.own_block(q, *(arrays[n] for n in _OWN_BLOCK), first=arrays.get("first"), **options)


def _own_block_gradients(q, arrays, do, lse, delta, **options):
    dq, dk, dv = own.part_gradients(q, *(arrays[n] for n in _OWN_BLOCK), do, lse, delta,
                                    first=arrays.get("first"), dtype=q.dtype, **options)
    return dq, {"k": dk, "v": dv}


_BLOCK_SPARSE = ("k", "v", "blocks_BxLxGxN", "starts_BxM")


def _block_sparse(q, arrays, **options):
    return block_xla.block_sparse(q, *(arrays[n] for n in _BLOCK_SPARSE), **options,
                                  return_lse=True)


def _block_sparse_gradients(q, arrays, do, lse, delta, **options):
    dq, dk, dv = block_xla.part_gradients(q, *(arrays[n] for n in _BLOCK_SPARSE), do, lse, delta,
                                          **options)
    return dq, {"k": dk, "v": dv}


def _token_sparse(q, arrays, **options):
    return token_xla.token_sparse(q, arrays["kv"], arrays["chosen_BxLxN"], **options,
                                  return_lse=True)


def _token_sparse_gradients(q, arrays, do, lse, delta, **options):
    dq, d_kv = token_xla.part_gradients(q, arrays["kv"], arrays["chosen_BxLxN"], do, lse, delta,
                                        **options)
    return dq, {"kv": d_kv}


WAYS = {
    "flash": Way(_flash, _flash_gradients, flash_op),
    "own_block": Way(_own_block, _own_block_gradients),
    "block_sparse": Way(_block_sparse, _block_sparse_gradients, block_sparse_op),
    "token_sparse": Way(_token_sparse, _token_sparse_gradients, token_sparse_op),
}


def merge(near, far):
    """Return one softmax of two parts, each (o [B, L, H, D], lse [B, L, H])."""
    lse = jnp.logaddexp(near[1], far[1])
    o = sum(o.astype(lse.dtype) * jnp.exp(part - lse)[..., None] for o, part in (near, far))
    return narrow(o, near[0].dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ways, q, arrays):
    found = None
    for (name, options), given in zip(ways, arrays, strict=True):
        part = WAYS[name].forward(q, given, **dict(options))
        found = part if found is None else merge(found, part)
    return found


def _attend_forward(ways, q, arrays):
    o, lse = _attend(ways, q, arrays)
    return (o, lse), (q, arrays, o, lse)


def _attend_backward(ways, kept, cotangents):
    # Without the barrier XLA sees that parts were computed before and keeps them alive.
    (q, arrays, o, lse), (do, d_lse) = lax.optimization_barrier((kept, cotangents))
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - d_lse
    dq, found = None, []
    for (name, options), given in zip(ways, arrays, strict=True):
        part, of_arrays = WAYS[name].gradients(q, given, do, lse, delta, **dict(options))
        if dq is not None:
            part = narrow(dq.astype(lse.dtype) + part.astype(lse.dtype), q.dtype)
        dq = part
        of_arrays = {n: narrow(d, given[n].dtype) for n, d in of_arrays.items()}
        found.append({n: of_arrays.get(n) for n in given})
    return dq, tuple(found)


_attend.defvjp(_attend_forward, _attend_backward)


def attend(q_BxLxHxD, parts: Sequence[Part]):
    """Return (o, lse) of one softmax over the keys of all parts, by XLA.

    Shapes: q [B, L, H, D] -> o [B, L, H, Dv] in q's dtype and lse [B, L, H] in float32, or float64
        for float64; -1e30 for a row that no part shows anything. A key that two parts show counts
        twice.
    """
    ways = tuple((part.way, tuple(sorted(part.options.items()))) for part in parts)
    return _attend(ways, q_BxLxHxD, tuple(part.arrays for part in parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recall(ways, q, arrays, o, lse):
    del ways, q, arrays
    return o, lse


def _recall_forward(ways, q, arrays, o, lse):
    del ways
    return (o, lse), (q, arrays, o, lse)


def _recall_backward(ways, kept, cotangents):
    return *_attend_backward(ways, kept, cotangents), None, None


_recall.defvjp(_recall_forward, _recall_backward)


def recall(q_BxLxHxD, parts: Sequence[Part], o_BxLxHxD, lse_BxLxH):
    """Return (o, lse) as `attend` gave them before; gradients are those of `attend`, by XLA.

    So that a backward pass that makes the queries again need not attend again.

    Shapes: as of `attend`.
    """
    ways = tuple((part.way, tuple(sorted(part.options.items()))) for part in parts)
    return _recall(ways, q_BxLxHxD, tuple(part.arrays for part in parts), o_BxLxHxD, lse_BxLxH)
