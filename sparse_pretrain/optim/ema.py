"""An exponential moving average of the parameters, as pure functions."""

from typing import Any

import jax
import jax.numpy as jnp


def init(params: Any) -> Any:
    """The average before the first update: a copy, so that donating `params` leaves it alive."""
    return jax.tree.map(jnp.copy, params)


def update(ema: Any, params: Any, decay: jax.typing.ArrayLike) -> Any:
    """decay * ema + (1 - decay) * params, for every parameter.

    Differs: written as ema + (1 - decay)(params - ema), which is exact when both are equal.
    """
    rate = 1.0 - jnp.asarray(decay, jnp.float32)
    return jax.tree.map(
        lambda e, p: e + rate.astype(e.dtype) * (p.astype(e.dtype) - e), ema, params
    )


def warmed(decay: float, step: jax.typing.ArrayLike) -> jax.Array:
    """The decay to use at `step`, so that early averages are not held by the first parameters.

    Source: min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
    """
    step = jnp.asarray(step).astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))
