"""AdamW with a rate and a decay per parameter group."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from sparse_pretrain import spec
from sparse_pretrain.optim import groups
from sparse_pretrain.optim.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """AdamW, decay decoupled but scaled by the learning rate.

    Units: `lr` peak learning rate; `embed_lr`, `head_lr`, `router_lr`, `memory_lr` multiples of it;
    `clip` largest global gradient norm, 0 for none.
    """

    KIND: ClassVar[str] = "adamw"

    lr: float = 3e-3
    embed_lr: float = 1.0
    head_lr: float = 1.0
    router_lr: float = 1.0
    memory_lr: float = groups.MEMORY_LR
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embed: bool = False  # the head is always decayed, norms, biases and memory never
    clip: float = 1.0

    def __post_init__(self):
        spec.positive(self, "lr", "embed_lr", "head_lr", "router_lr", "memory_lr", "eps")
        check_adam(self)


def check_adam(config: Any) -> None:
    """ValueError for the first of the fields all optimizers share that is out of range."""
    for name in ("b1", "b2"):
        value = getattr(config, name)
        spec.require(0 <= value < 1, f"{name}: must be in [0, 1), got {value}")
    for name in ("weight_decay", "clip"):
        value = getattr(config, name)
        spec.require(value >= 0, f"{name}: must be 0 or more, got {value}")


def build(
    config: Config, dims: Any, schedule: Schedule, factors: Any = None
) -> optax.GradientTransformation:
    """The update rule for parameters with these dimension names.

    Shapes: `dims` is the nested dict of the parameters with a tuple of names at each leaf;
        `factors` what optim/transfer.py says of each, if anything.
    Source: 1711.05101, algorithm 2, with the rate times the decay as in torch.
    """
    return finish(config, dims, schedule, adam(config), factors)


class AdamW:
    """Adam on every parameter; matrices, the head and the routers decay."""

    KIND = Config.KIND
    Config = Config
    build = staticmethod(build)


def adam(config: Any) -> optax.GradientTransformation:
    """Adam's direction."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def decayed(config: Any, dims: tuple[str, ...]) -> bool:
    """Whether a parameter of these dims decays."""
    kind = groups.group(dims)
    return kind not in ("vector", "memory") and (kind != "embed" or config.decay_embed)


def finish(
    config: Any,
    dims: Any,
    schedule: Schedule,
    direction: optax.GradientTransformation,
    moved: Any = None,
) -> optax.GradientTransformation:
    """Clipping before a direction; decay, group rates and the learning rate after it."""
    factors = groups.map_dims(lambda d: factor(config, d), dims)
    mask = groups.map_dims(lambda d: decayed(config, d), dims)
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
    if moved is not None:
        factors = jax.tree.map(lambda a, b: a * b, factors, moved.rate)
        each = jax.tree.map(lambda m, d: config.weight_decay * d if m else 0.0, mask, moved.decay)
        decay = optax.stateless(
            lambda u, p: jax.tree.map(lambda u, p, d: u + d * p if d else u, u, p, each)
        )
    chain = [
        clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        direction,
        decay,
        optax.stateless(lambda u, _: jax.tree.map(_times, u, factors)),
        optax.scale_by_learning_rate(schedule),
    ]
    return standard_promotion(optax.chain(*chain))


def clip_by_global_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients so that their global norm is at most `largest`.

    The update takes the norm as `norm`, where some gradients are there more than once; without, it
    is that of all gradients.
    Differs: multiplies by min(1, largest / norm), which XLA fuses into every reader; the division
    per element in `optax.clip_by_global_norm` writes the clipped gradient out first.
    """

    def update(updates, state, params=None, *, norm=None, **unused):
        del params, unused
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _times(update: jax.Array, factor: float) -> jax.Array:
    return update if factor == 1.0 else update * jnp.asarray(factor, update.dtype)


def factor(config: Any, dims: tuple[str, ...]) -> float:
    """The multiple of the scheduled rate that a parameter of these dims learns at."""
    kind = groups.group(dims)
    base = 1.0
    if getattr(config, "adam_lr", None) is not None and not config.orthogonal(dims):
        base = config.adam_lr / config.lr
    own = getattr(config, f"{kind}_lr") if kind in ("embed", "head", "router", "memory") else 1.0
    return base * own


def standard_promotion(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same rule, traced under JAX's standard dtype promotion, which optax relies on."""
    rule = optax.with_extra_args_support(rule)

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return rule.init(params)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return rule.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
