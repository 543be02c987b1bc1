"""Muon for linear maps, AdamW for everything else."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from sparse_pretrain import spec
from sparse_pretrain.optim import adamw, groups
from sparse_pretrain.optim.newton_schulz import POLISH, QUINTIC, orthogonalize
from sparse_pretrain.optim.schedules import Schedule

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """Muon's matrices and the AdamW of the rest.

    Units: `lr` peak learning rate of the matrices; `adam_lr` that of the rest, None for the same;
    `embed_lr`, `head_lr`, `router_lr`, `memory_lr` multiples of their group's rate; `rms` root mean
    square of an update before the rate, 0 for Jordan's sqrt(max(1, out / in)); `clip` largest
    global gradient norm, 0 for none.
    """

    KIND: ClassVar[str] = "muon"

    lr: float = 3e-3
    adam_lr: float | None = None
    embed_lr: float = 1.0
    head_lr: float = 1.0
    router_lr: float = 1.0
    memory_lr: float = groups.MEMORY_LR
    momentum: float = 0.95
    nesterov: bool = True
    rms: float = 0.2  # Moonlight 2502.16982; DeepSeek-V4 uses 0.18
    per_head: bool = False
    router: str = "adamw"
    ns_steps: int = 5  # DeepSeek-V4: 8, and 2 polishing
    ns_polish: int = 0
    ns_coefficients: tuple[float, float, float] = QUINTIC
    ns_dtype: str = "bfloat16"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embed: bool = False
    clip: float = 1.0

    def __post_init__(self):
        spec.positive(self, "lr", "embed_lr", "head_lr", "router_lr", "memory_lr", "eps")
        adamw.check_adam(self)
        ok = self.adam_lr is None or self.adam_lr > 0
        spec.require(ok, f"adam_lr: must be positive or None, got {self.adam_lr}")
        spec.require(0 <= self.momentum < 1, f"momentum: must be in [0, 1), got {self.momentum}")
        spec.require(self.rms >= 0, f"rms: must be 0 or more, got {self.rms}")
        for name in ("ns_steps", "ns_polish"):
            value = getattr(self, name)
            spec.require(0 <= value <= 50, f"{name}: must be 0 to 50, got {value}")
        steps = self.ns_steps + self.ns_polish
        spec.require(steps > 0, f"ns_steps: no steps at all, ns_steps + ns_polish = {steps}")
        ok = self.ns_dtype in DTYPES
        spec.require(ok, f"ns_dtype: expected one of {DTYPES}, got {self.ns_dtype!r}")
        ok = self.router in ("adamw", "muon")
        spec.require(ok, f"router: expected 'adamw' or 'muon', got {self.router!r}")

    def orthogonal(self, dims: tuple[str, ...]) -> bool:
        """Whether a parameter of these dims follows Muon and not AdamW."""
        kind = groups.group(dims)
        return kind in ("matrix", "unknown") or (kind == "router" and self.router == "muon")


class State(NamedTuple):
    """Momentum of the matrices; None is at the place of every other parameter."""

    momentum: Any


def build(
    config: Config, dims: Any, schedule: Schedule, factors: Any = None
) -> optax.GradientTransformation:
    """The update rule for parameters with these dimension names.

    Shapes: `dims` is the nested dict of the parameters with a tuple of names at each leaf;
        `factors` what optim/transfer.py says of each, if anything.
    Errors: ValueError naming the first parameter of three or more dims whose names do not say
    which of them its matrices reduce over.
    Source: Jordan 2024; 2502.16982 (root mean square, decay); 2606.19348 (coefficients).
    Differs: from `optax.contrib.muon`, no bias correction (the result has no scale, so it
    would only tilt Nesterov's mix in the first steps), and no silent fall-back to Adam.
    """
    for name, d in groups.leaves(dims):
        if groups.group(d) == "unknown":
            raise ValueError(
                f"{name}: dims {d} name no Muon dimension numbers; teach optim/groups.py which "
                "of them are copies or heads, or use optim.kind=adamw"
            )
    labels = groups.map_dims(lambda d: "muon" if config.orthogonal(d) else "adam", dims)
    direction = optax.partition(
        {"muon": scale_by_muon(config, dims), "adam": adamw.adam(config)}, labels
    )
    return adamw.finish(config, dims, schedule, direction, factors)


class Muon:
    """Momentum orthogonalised by Newton-Schulz, one matrix per layer, expert and perhaps head."""

    KIND = Config.KIND
    Config = Config
    build = staticmethod(build)


def scale_by_muon(config: Config, dims: Any) -> optax.GradientTransformation:
    """Replaces gradients by orthogonalised momentum; parameters masked out are left alone."""
    numbers = groups.map_dims(
        lambda d: (
            groups.dimension_numbers(d, per_head=config.per_head) if config.orthogonal(d) else None
        ),
        dims,
    )
    coefficients = (config.ns_coefficients,) * config.ns_steps + (POLISH,) * config.ns_polish
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

    def init(params):
        return State(jax.tree.map(jnp.zeros_like, params))

    def one(update, number):
        if masked(update):
            return update
        x, restore = as_matrices(update, number)
        out = orthogonalize(x, coefficients, dtype=jnp.dtype(config.ns_dtype))
        return restore(out * scale(x.shape[1], x.shape[2], config.rms))

    def update(updates, state, params=None):
        del params
        mu = config.momentum
        momentum = jax.tree.map(lambda m, g: mu * m + g, state.momentum, updates)
        ahead = momentum
        if config.nesterov:
            ahead = jax.tree.map(lambda m, g: mu * m + g, momentum, updates)
        flat, tree = jax.tree.flatten(ahead, is_leaf=masked)
        flat_numbers = jax.tree.leaves(
            numbers, is_leaf=lambda n: n is None or isinstance(n, MuonDimensionNumbers)
        )
        out = [one(u, n) for u, n in zip(flat, flat_numbers, strict=True)]
        return jax.tree.unflatten(tree, out), State(momentum)

    return optax.GradientTransformation(init, update)


def scale(fan_in: float, fan_out: float, rms: float) -> float:
    """What an orthogonal update is multiplied with so that its root mean square is `rms`."""
    if rms:
        return rms * math.sqrt(max(fan_in, fan_out))
    return math.sqrt(max(1.0, fan_out / fan_in))


def as_matrices(x: jax.Array, numbers: MuonDimensionNumbers):
    """`x` as [copies, reduction, output], and the function that undoes it."""
    tup = lambda a: (a,) if isinstance(a, int) else tuple(a)  # noqa: E731
    rows, cols = tup(numbers.reduction_axis), tup(numbers.output_axis)
    copies = tuple(i for i in range(x.ndim) if i not in rows + cols)
    order = copies + rows + cols
    size = lambda dims: math.prod(x.shape[i] for i in dims)  # noqa: E731
    moved = tuple(x.shape[i] for i in order)
    back = tuple(order.index(i) for i in range(x.ndim))
    matrices = x.transpose(order).reshape(size(copies), size(rows), size(cols))
    return matrices, lambda y: y.reshape(moved).transpose(back)
