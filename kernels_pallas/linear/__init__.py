"""linear: rows times a matrix, with gradients written in the form each platform runs fastest."""

from kernels_pallas.linear import reference, xla
from kernels_pallas.op import Backend, Op

op = Op("linear", (Backend("xla", xla.linear), Backend("reference", reference.linear)))


def linear(x, w, *, implementation=None):
    """x @ w in x's dtype, contracted in float32.

    Shapes: x [..., D], w [D, F] in any float dtype (a float32 master is cast) -> [..., F].
    The gradient of w has w's dtype and is accumulated in float32.
    """
    return op(x, w, implementation=implementation)


explain = op.explain
