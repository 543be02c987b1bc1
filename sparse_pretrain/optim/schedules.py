"""Learning-rate schedules in tokens: warm-up, then constant, cosine or stable-and-decay."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_pretrain import spec

KINDS = ("wsd", "cosine", "constant")
SHAPES = ("1-sqrt", "linear", "cosine")

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """The course of the learning rate over a run, relative to its peak.

    Units: `warmup` and `decay` tokens, or below 1 a fraction of the run; `final` of the peak.
    `decay` and `shape` belong to `wsd`; `cosine` decays from the end of warm-up to the end.
    """

    kind: str = "wsd"
    warmup: float = 0.02
    decay: float = 0.2
    shape: str = "1-sqrt"  # 2405.18392 finds it better than linear at equal length
    final: float = 0.0

    def __post_init__(self):
        spec.require(self.kind in KINDS, f"kind: expected one of {KINDS}, got {self.kind!r}")
        spec.require(self.shape in SHAPES, f"shape: expected one of {SHAPES}, got {self.shape!r}")
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value >= 0
            spec.require(ok, f"{name}: must be tokens or a fraction, 0 or more, got {value}")
        spec.require(0 <= self.final <= 1, f"final: must be between 0 and 1, got {self.final}")


def tokens(value: float, total_tokens: int) -> float:
    """`value` in tokens: below 1 it is that fraction of the run."""
    return value * total_tokens if value < 1 else float(value)


def make(config: Config, *, peak: float, total_tokens: int, tokens_per_step: int) -> Schedule:
    """The function from optimizer step (0 is the first) to learning rate.

    Step n is priced at the token it starts from, so the rate leaves the peak at
    `total - decay`, and would reach `final * peak` at the step after the last; during warm-up it
    is priced at the token it ends on, so the first step already learns.
    Units: `total_tokens` and `tokens_per_step` targets over all processes.
    Errors: ValueError when warm-up and decay together exceed the run, with both numbers, or when
    one of them is shorter than one step.
    Source: WSD, MiniCPM 2404.06395 eq. 1; 1-sqrt, 2405.18392.
    """
    spec.require(peak > 0, f"lr: must be positive, got {peak}")
    warmup = tokens(config.warmup, total_tokens)
    decay = tokens(config.decay, total_tokens) if config.kind == "wsd" else 0.0
    for name in ("warmup", "decay"):
        value = getattr(config, name)
        spec.require(
            value < 1 or value >= tokens_per_step,
            f"{name}: {value:g} tokens is less than one step of {tokens_per_step} tokens; "
            "give tokens, or a fraction of the run below 1",
        )
    spec.require(
        warmup + decay <= total_tokens,
        f"warmup: {warmup:.0f} tokens of warm-up and {decay:.0f} of decay exceed the run's "
        f"{total_tokens} tokens",
    )
    if config.kind == "cosine":
        decay = total_tokens - warmup
    # Counted in steps, since float32 holds step numbers exactly and token numbers not.
    warmup_steps, decay_steps = warmup / tokens_per_step, decay / tokens_per_step
    start = (total_tokens - decay) / tokens_per_step
    shape = "cosine" if config.kind == "cosine" else config.shape

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step).astype(jnp.float32)
        up = jnp.minimum((step + 1.0) / max(warmup_steps, 1e-9), 1.0)
        done = jnp.clip((step - start) / max(decay_steps, 1e-9), 0.0, 1.0)
        down = config.final + (1.0 - config.final) * _falling(shape, done)
        return peak * up * (down if decay_steps > 0 else 1.0)

    return schedule


def _falling(shape: str, done: jax.Array) -> jax.Array:
    if shape == "linear":
        return 1.0 - done
    if shape == "1-sqrt":
        return 1.0 - jnp.sqrt(done)
    return 0.5 * (1.0 + jnp.cos(jnp.pi * done))
