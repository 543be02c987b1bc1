"""RMSNorm, rotary positions (with YaRN), SwiGLU: plain functions and the modules that hold them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.sharding import ops


def rms_norm(x: Float[Array, "... D"], scale_D: Float[Array, " D"], eps: float):
    """x over its root mean square, times a learned scale; float32 inside, x's dtype outside."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = jnp.reshape(scale_D, (1,) * (x.ndim - 1) + scale_D.shape)
    return (x32 * inverse * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale of `width`."""

    def __init__(self, width: int, keys: nn.Keys, *, eps: float = 1e-6, dim: str = "D"):
        self.eps = eps
        self.scale = nn.param(keys, (width,), (dim,), value=1.0)

    def __call__(self, x):
        return rms_norm(x, nn.read(self.scale), self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(spec.Config):
    """Rotary positions, extended by YaRN when `factor` exceeds 1.

    Units: `original` tokens, the length the model was first trained at.
    Source: RoFormer (2104.09864); YaRN (2309.00071), constants as in DeepSeek-V3's code.
    """

    theta: float = 10000.0
    interleaved: bool = False
    factor: float = 1.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    def __post_init__(self):
        spec.positive(self, "original", "beta_fast", "beta_slow")
        spec.require(self.theta > 1, f"theta: must be above 1, got {self.theta}")
        spec.require(self.factor >= 1.0, f"factor: must be at least 1, got {self.factor}")

    @property
    def softmax_gain(self) -> float:
        """What YaRN multiplies the softmax scale by: (0.1 mscale ln factor + 1)^2."""
        if self.factor <= 1.0:
            return 1.0
        return (0.1 * self.mscale * math.log(self.factor) + 1.0) ** 2


def rope_frequencies(width: int, config: RopeConfig) -> np.ndarray:
    """Angle per token of each of the width/2 planes, float32."""
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    frequency = config.theta**-exponents
    if config.factor <= 1.0:
        return frequency.astype(np.float32)

    def plane(rotations: float) -> float:
        turns = config.original / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(config.theta))

    low = max(math.floor(plane(config.beta_fast)), 0)
    high = min(math.ceil(plane(config.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (frequency / config.factor * ramp + frequency * (1 - ramp)).astype(np.float32)


def rope(x_BxLxHxR: Float[Array, "B L H R"], positions_BxL: Int[Array, "B L"], config: RopeConfig):
    """Rotates each plane of the last dim by position times its frequency, in float32.

    Planes are (i, i + R/2), or (2i, 2i + 1) when `interleaved`.
    """
    width = x_BxLxHxR.shape[-1]
    frequency = jnp.asarray(rope_frequencies(width, config))
    angle = positions_BxL.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x = x_BxLxHxR.astype(jnp.float32)
    if config.interleaved:
        x = x.reshape(*x.shape[:-1], width // 2, 2)
        a, b = x[..., 0], x[..., 1]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x_BxLxHxR.shape)
    else:
        a, b = x[..., : width // 2], x[..., width // 2 :]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x_BxLxHxR.dtype)


@jax.custom_vjp
def swiglu(gate, up):
    """silu(gate) * up in the inputs' dtype, float32 inside.

    The logistic is written through tanh, which XLA:CPU vectorises 3 times faster than exp and
    divide, and the backward pass recomputes it instead of keeping it.
    """
    g = gate.astype(jnp.float32)
    return (g * (0.5 + 0.5 * jnp.tanh(0.5 * g)) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, dy):
    gate, up = (r.astype(jnp.float32) for r in residuals)
    dy = dy.astype(jnp.float32)
    s = 0.5 + 0.5 * jnp.tanh(0.5 * gate)
    d_gate = dy * up * (s * (1 + gate * (1 - s)))
    dtype = residuals[0].dtype
    return d_gate.astype(dtype), (dy * gate * s).astype(dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Source: 2002.05202.
    """

    def __init__(self, width: int, hidden: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.w_gate = nn.param(keys, (width, hidden), ("D", "F"), std=width**-0.5)
        self.w_up = nn.param(keys, (width, hidden), ("D", "F"), std=width**-0.5)
        self.w_down = nn.param(keys, (hidden, width), ("F", "D"), std=out_gain * hidden**-0.5)

    def __call__(self, x):
        gate = ops.linear(x, nn.read(self.w_gate))
        up = ops.linear(x, nn.read(self.w_up))
        return ops.linear(swiglu(gate, up), nn.read(self.w_down))
