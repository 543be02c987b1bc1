"""sinkhorn written out."""

import jax


def sinkhorn(logits, *, iterations, eps):
    """Divide by the sums in turns, differentiated by JAX."""
    m = jax.nn.softmax(logits, axis=-1) + eps
    m = m / (m.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return m
