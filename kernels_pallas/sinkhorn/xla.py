"""sinkhorn for any platform: a loop whose steps are computed again in the backward pass."""

import jax
import jax.numpy as jnp


def sinkhorn(logits, *, iterations, eps):
    """Divide by the sums in turns."""
    m = jax.nn.softmax(logits, axis=-1) + eps
    m = m / (jnp.sum(m, axis=-2, keepdims=True) + eps)

    # a loop: unrolled, XLA:CPU fuses each division into both sums after it and compiles for minutes
    @jax.checkpoint
    def again(m, _):
        m = m / (jnp.sum(m, axis=-1, keepdims=True) + eps)
        return m / (jnp.sum(m, axis=-2, keepdims=True) + eps), None

    return jax.lax.scan(again, m, length=iterations - 1)[0]
