"""Everything a step carries to the next, as one frozen pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain import nn, optim
from sparse_pretrain.sharding import apply, offload


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
    definition: nn.Definition,
    tx: Any,
    seed: int,
    *,
    ema: bool,
    game: Any = None,
    placed: apply.Placed | None = None,
    host: bool = False,
) -> TrainState:
    """The state before the first step; one compiled call, so that nothing is built op by op.

    Under a plan every device makes its own part, the same numbers as one device would. With `host`
    the optimizer's state lies in the host's memory.
    """
    build = _builder(definition, tx, ema, game)
    if placed is None and not host:
        return jax.jit(build)(jax.random.key(seed))
    shapes = jax.eval_shape(build, jax.random.key(seed))
    if placed is None:
        return jax.jit(build, out_shardings=_alone(shapes))(jax.random.key(seed))
    where = shardings(shapes, definition, placed, host=host)
    # the key comes as a number, for one array is not on all processes' devices
    return placed.jit(lambda: build(jax.random.key(seed)), out_shardings=where)()


def abstract(
    definition: nn.Definition,
    tx: Any,
    *,
    ema: bool,
    game: Any = None,
    placed: apply.Placed | None = None,
    host: bool = False,
) -> TrainState:
    """The state's shapes and where each lies, without arrays: what a step is lowered for."""
    shapes = jax.eval_shape(_builder(definition, tx, ema, game), jax.random.key(0))
    if placed is None:
        return shapes
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(shapes, definition, placed, host=host),
    )


def _alone(shapes: TrainState) -> TrainState:
    """On one device, the optimizer's state in its host's memory."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: here, shapes)
    return where._replace(opt=offload.shardings(shapes.opt, where.opt))


def shardings(
    shapes: TrainState, definition: nn.Definition, placed: apply.Placed, *, host: bool = False
) -> TrainState:
    """Where each leaf of a state lies: optimizer state and averages as the plan's optimizer.

    With `host` the optimizer's state lies so in the host's memory.
    """
    laid = {f: placed.lay(getattr(shapes, f), definition) for f in shapes._fields}
    for field in ("opt", "ema"):
        laid[field] = placed.lay(getattr(shapes, field), definition, "optimizer")
    if host:
        laid["opt"] = offload.shardings(shapes.opt, laid["opt"])
    return TrainState(**laid)


def _builder(definition, tx, ema, game):
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

    return build
