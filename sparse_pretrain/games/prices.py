"""Expert markets: how the price of an expert moves with the demand for it.

A router's bias is minus the price. Every rule is a pure function of the last batch's load, applied
once per optimizer step and outside the gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def sign(bias_E: Float[Array, "... E"], load_E: Float[Array, " E"], rate: float):
    """bias + rate * sign(mean load - load), with the mean of the moves taken out.

    Shapes: [E] or stacked [N, E]. Source: 2408.15664 algorithm 1.
    Differs: moves are centred, so the mean bias does not drift; top-k is blind to a common shift.
    """
    move = jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
    return bias_E + rate * (move - jnp.mean(move, axis=-1, keepdims=True))


def max_violation(load_E: Float[Array, "... E"]):
    """MaxVio: how far the busiest expert is above the mean load, as a share of the mean.

    Source: 2408.15664 equation 4.
    """
    mean = jnp.mean(load_E, axis=-1)
    return jnp.max(load_E, axis=-1) / jnp.maximum(mean, 1e-9) - 1
