"""grouped_swiglu for any platform: two products, then the activation in float32."""

import jax
import jax.numpy as jnp

from kernels_pallas import device
from kernels_pallas.grouped_matmul import xla
from kernels_pallas.rounding import narrow


def bend(gate, up):
    """Return silu(gate) * up of float32 (or float64) numbers."""
    return gate * (0.5 + 0.5 * jnp.tanh(0.5 * gate)) * up


def slopes(gate, up, dy):
    """Return the gradients of gate and up for that of `bend`."""
    s = 0.5 + 0.5 * jnp.tanh(0.5 * gate)
    return dy * up * (s * (1 + gate * (1 - s))), dy * gate * s


def wide(x):
    """Return x in float32, or float64 for float64."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


@jax.custom_vjp
def _activation(gate, up):
    return narrow(bend(wide(gate), wide(up)), gate.dtype)


def _forward(gate, up):
    return _activation(gate, up), (gate, up)


def _backward(kept, dy):
    # The barrier keeps XLA from saving forward's float32 numbers for the backward pass: 1.88 and
    # not 2.22 GB for OLMoE on a v5p. A TPU7x's compiler (libtpu 0.0.50.1) aborts on it.
    gate, up = kept if device.target().kind == "TPU7x" else jax.lax.optimization_barrier(kept)
    return tuple(narrow(d, gate.dtype) for d in slopes(wide(gate), wide(up), wide(dy)))


_activation.defvjp(_forward, _backward)


def grouped_swiglu(x, gate, up, layout):
    """Multiply twice and bend."""
    return _activation(*(xla.grouped_matmul(x, w, layout) for w in (gate, up)))
