"""Everything a step carries to the next, as one frozen pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain import nn, optim


class TrainState(NamedTuple):
    """Shapes: `step` [] int32; `params`, `router`, `ema` nested dicts; `key` a PRNG key.

    `router` holds the expert prices, `game` the state of games and of re-placement, `ema` the
    averaged parameters ({} when off).
    """

    step: jax.Array
    params: Any
    opt: Any
    router: Any
    game: Any
    ema: Any
    key: jax.Array


def create(
    definition: nn.Definition, tx: Any, seed: int, *, ema: bool, game: Any = None
) -> TrainState:
    """The state before the first step; one compiled call, so that nothing is built op by op."""

    def build(key):
        init_key, key = jax.random.split(key)
        params, prices = definition.init(init_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt=tx.init(params),
            router=prices,
            game=game or {},
            ema=optim.ema.init(params) if ema else {},
            key=key,
        )

    return jax.jit(build)(jax.random.key(seed))
