"""grouped_swiglu written out: both products of every expert, and then the activation."""

import jax

from kernels_pallas.grouped_matmul import reference


def grouped_swiglu(x, gate, up, layout):
    """Multiply, bend and multiply."""
    gate, up = (reference.grouped_matmul(x, w, layout) for w in (gate, up))
    return jax.nn.silu(gate) * up
