"""grouped_swiglu on a TPU's matrix units: both products in one kernel, the activation at its end.

The products go to memory only where the backward pass wants them, and are not read again to be
bent. That multiplies rows' gradients by both matrices into one sum, so that no part of them is
rounded or added up in memory. For a matrix's gradient one kernel for both would save nothing: with
the same memory for sums, tiles half as wide read rows as often as two kernels do.
"""

from __future__ import annotations

import functools

import jax

from kernels_pallas.grouped_matmul.mosaic_tpu import rows_times, weight_gradient
from kernels_pallas.grouped_swiglu import xla


def _bent(gate, up):
    return [xla.bend(gate, up)]


def _bent_and_kept(gate, up):
    return xla.bend(gate, up), gate, up


@jax.custom_vjp
def grouped_swiglu(x, gate, up, layout):
    """Multiply and bend in one kernel; rows of no group become zero."""
    return rows_times("swiglu", [x], [w.astype(x.dtype) for w in (gate, up)], layout,
                      bend=_bent)[0]


def _forward(x, gate, up, layout):
    cast = [w.astype(x.dtype) for w in (gate, up)]
    y, *made = rows_times("swiglu_kept", [x], cast, layout, bend=_bent_and_kept)
    return y, (x, gate, up, layout, *made)


def _backward(kept, dy):
    x, gate, up, layout, *made = kept
    d = [a.astype(x.dtype) for a in xla.slopes(*map(xla.wide, (*made, dy)))]
    dx = rows_times("swiglu_rows", d, [w.astype(x.dtype) for w in (gate, up)], layout)
    weigh = functools.partial(weight_gradient, x, layout=layout, dtype=gate.dtype)
    return dx, *map(weigh, d), None


grouped_swiglu.defvjp(_forward, _backward)
