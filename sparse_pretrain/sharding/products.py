"""Linear products as the model calls them: plain, spread by a plan, or in 8 bits."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import device
from kernels_pallas.grouped_matmul import Layout, aligned
from kernels_pallas.grouped_matmul import grouped_matmul as _grouped_linear
from kernels_pallas.grouped_swiglu import op as _grouped_swiglu
from kernels_pallas.linear import linear as _linear
from kernels_pallas.scaled_matmul import scaled_matmul as _scaled_matmul
from sparse_pretrain.sharding import apply

_EIGHT_BITS: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "eight_bits", default=None
)


@contextlib.contextmanager
def eight_bits(on: bool, *, power_of_two: bool = False) -> Iterator[None]:
    """What is traced inside takes linear products of bfloat16 in 8 bits; float32 ones never.

    Errors: ValueError under a plan, whose products are XLA's to partition.
    """
    if on and apply.current() is not None:
        raise ValueError("precision.products: fp8 runs on one device, under plan=single")
    token = _EIGHT_BITS.set({"power_of_two": power_of_two} if on else None)
    try:
        yield
    finally:
        _EIGHT_BITS.reset(token)


def group_layout(sizes, *, pairs: int) -> Layout:
    """Where rows of groups of these sizes lie. Shapes: sizes [E], which sum to at most `pairs`.

    An expert's rows lie in two places on CPU, whose products are fastest so; kernels, and scales of
    8 bits for tiles of an expert's rows, want them in one.
    """
    split = device.platform() == "cpu" and _EIGHT_BITS.get() is None
    return aligned(sizes, pairs=pairs, split=split)


def grouped_linear(x, w, layout):
    """Each row of expert e times w[e]. Shapes: x [R, D], w [E, D, F] -> [R, F], in x's dtype."""
    scales = _EIGHT_BITS.get()
    if scales is not None and x.dtype == jnp.bfloat16:
        return _scaled_matmul(x, w, layout, **scales)
    return _grouped_linear(x, w, layout)


def grouped_swiglu(x, gate, up, layout, swiglu):
    """swiglu(x gate[e], x up[e]) for each row of expert e, in one kernel where that is preferred.

    Shapes: x [R, D], gate and up [E, D, F] -> [R, F], in x's dtype.
    """
    if _EIGHT_BITS.get() is None:
        backend = _grouped_swiglu.choose(x, gate, up, layout)
        if backend.name.startswith("mosaic"):
            return backend.fn(x, gate, up, layout)
    return swiglu(*(grouped_linear(x, w, layout) for w in (gate, up)))


def linear(x, w, contract: int = 1):
    """The last `contract` dims of x against the first of w; remaining dims of w are appended.

    Shapes: x [..., *C], w [*C, *O] -> [..., *O], in x's dtype.
    """
    inner, outer = w.shape[:contract], w.shape[contract:]
    lead = x.shape[: x.ndim - contract]
    scales = _EIGHT_BITS.get()
    if scales is not None and x.dtype == jnp.bfloat16:
        rows, columns = math.prod(inner), math.prod(outer)
        y = _scaled_matmul(x.reshape(*lead, rows), w.reshape(rows, columns), **scales)
        return y.reshape(*lead, *outer)
    if apply.current() is not None:
        return _spread(contract, x, w)
    size_in, size_out = math.prod(inner), math.prod(outer)
    y = _linear(jnp.reshape(x, (*lead, size_in)), jnp.reshape(w, (size_in, size_out)))
    return jnp.reshape(y, (*lead, *outer))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(contract: int, x, w):
    """`linear` without reshapes, which would mix dims that lie on different devices."""
    return jnp.tensordot(x, w.astype(x.dtype), contract)


def _spread_backward(contract, kept, dy):
    x, w = kept
    dy, lead = dy.astype(x.dtype), x.ndim - contract
    outer = tuple(range(contract, w.ndim)), tuple(range(lead, dy.ndim))
    dx = jax.lax.dot_general(dy, w.astype(x.dtype), ((outer[1], outer[0]), ((), ())))
    rows = tuple(range(lead))
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    dw = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=wide)
    return dx, dw.astype(w.dtype)


# the product itself in the forward pass: a remat policy that keeps products must see one
_spread.defvjp(
    lambda contract, x, w: (jnp.tensordot(x, w.astype(x.dtype), contract), (x, w)),
    _spread_backward,
)
