"""RMSNorm, rotary positions (with YaRN), SwiGLU: plain functions and the modules that hold them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas import device
from kernels_pallas.rounding import narrow
from sparse_pretrain import nn, spec
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops


def wide(dtype) -> Any:
    """The dtype of sums and elementwise work: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def materialise(x):
    """x, written to memory once on CPU, where XLA would rather compute it again in each reader.

    Readers of normed and gated activations are matrix products and, in the backward pass, their
    transposed copy, which costs 0.3 ms computed anew and 0.05 copied (2048 x 256, jax 0.12).
    """
    return jax.lax.optimization_barrier(x) if device.platform() == "cpu" else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*lead D"], scale_D: Float[Array, " D"], eps: float
) -> Float[Array, "*lead D"]:
    """x over its root mean square, times a learned scale; float32 inside, x's dtype outside.

    Its backward pass keeps x and one number per row.
    """
    return _rms_forward(x, scale_D, eps)[0]


def _rms_forward(x, scale_D, eps):
    x32 = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = materialise(narrow(x32 * inverse * _along_last(scale_D, x32), x.dtype))
    return y, (x, scale_D, inverse)


def _rms_backward(eps, residuals, dy):
    del eps
    # the barrier keeps XLA from saving forward's float32 intermediates for the backward pass
    x, scale_D, inverse = jax.lax.optimization_barrier(residuals)
    x32, dy32 = x.astype(inverse.dtype), dy.astype(inverse.dtype)
    normal = x32 * inverse
    d_normal = dy32 * _along_last(scale_D, x32)
    along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    dx = narrow(inverse * (d_normal - normal * along), x.dtype)
    d_scale = jnp.sum(dy32 * normal, axis=tuple(range(x.ndim - 1)))
    return dx, d_scale.astype(scale_D.dtype)


def _along_last(scale_D, like):
    return jnp.reshape(scale_D, (1,) * (like.ndim - 1) + scale_D.shape).astype(like.dtype)


rms_norm.defvjp(lambda x, scale, eps: _rms_forward(x, scale, eps), _rms_backward)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale of `width`."""

    def __init__(self, width: int, keys: nn.Keys, *, eps: float = 1e-6, dim: str = "D"):
        self.eps = eps
        self.scale = nn.param(keys, (width,), (dim,), value=1.0)

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
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


def rope(
    x_BxLxHxD: Float[Array, "B L H D"],
    positions_BxL: Int[AnyArray, "B L"],
    config: RopeConfig,
    *,
    start: int = 0,
) -> Float[Array, "B L H D"]:
    """Rotates each plane of the dims from `start` on by position times its frequency, in float32.

    Planes are (i, i + R/2) of the R rotated dims, or (2i, 2i + 1) when `interleaved`.
    """
    frequency = jnp.asarray(rope_frequencies(x_BxLxHxD.shape[-1] - start, config))
    angle = positions_BxL.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    # one table for all heads: without the barrier XLA computes it again for every element
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    return _rotate(start, config.interleaved, x_BxLxHxD, cos, sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(start: int, interleaved: bool, x, cos, sin):
    r = x[..., start:].astype(wide(x.dtype))
    cos, sin = cos.astype(r.dtype), sin.astype(r.dtype)
    if interleaved:
        pairs = r.reshape(*r.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        r = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(r.shape)
    else:
        # rounded before they are joined: XLA:CPU writes out what goes into a concatenation
        a, b = jnp.split(r, 2, axis=-1)
        a, b = a * cos - b * sin, b * cos + a * sin
        return jnp.concatenate([x[..., :start], narrow(a, x.dtype), narrow(b, x.dtype)], axis=-1)
    return jnp.concatenate([x[..., :start], narrow(r, x.dtype)], axis=-1)


# a rotation's transpose is the rotation back: no padding and adding of slices
_rotate.defvjp(
    lambda start, interleaved, x, cos, sin: (_rotate(start, interleaved, x, cos, sin), (cos, sin)),
    lambda start, interleaved, kept, dy: (
        _rotate(start, interleaved, dy, kept[0], -kept[1]), None, None,
    ),
)


def half_split(w: Float[Array, "*lead R"]) -> Float[Array, "*lead R"]:
    """The columns of a projection in the order in which planes (2i, 2i + 1) are (i, i + R/2).

    Queries and keys that are both reordered have the same scores, and rotating halves is fast where
    rotating neighbours is not; reordering the weight costs next to nothing.
    """
    return jnp.swapaxes(w.reshape(*w.shape[:-1], -1, 2), -1, -2).reshape(w.shape)


@jax.custom_vjp
def swiglu(
    gate: Float[Array, "*lead F"], up: Float[Array, "*lead F"]
) -> Float[Array, "*lead F"]:
    """silu(gate) * up in the inputs' dtype, float32 inside.

    The logistic is written through tanh, which XLA:CPU vectorises 3 times faster than exp and
    divide, and the backward pass recomputes it instead of keeping it.
    """
    g = gate.astype(wide(gate.dtype))
    y = narrow(g * (0.5 + 0.5 * jnp.tanh(0.5 * g)) * up.astype(g.dtype), gate.dtype)
    return materialise(y)


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, dy):
    # the barrier keeps XLA from saving forward's float32 tanh for the backward pass
    gate, up = (r.astype(wide(r.dtype)) for r in jax.lax.optimization_barrier(residuals))
    dy = dy.astype(gate.dtype)
    s = 0.5 + 0.5 * jnp.tanh(0.5 * gate)
    d_gate = dy * up * (s * (1 + gate * (1 - s)))
    dtype = residuals[0].dtype
    return narrow(d_gate, dtype), narrow(dy * gate * s, dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Source: 2002.05202.
    """

    def __init__(self, width: int, hidden: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.w_gate = nn.param(keys, (width, hidden), ("D", "F"), std=width**-0.5)
        self.w_up = nn.param(keys, (width, hidden), ("D", "F"), std=width**-0.5)
        self.w_down = nn.param(keys, (hidden, width), ("F", "D"), std=out_gain * hidden**-0.5)

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        gate = ops.linear(x, nn.read(self.w_gate, x.dtype))
        up = ops.linear(x, nn.read(self.w_up, x.dtype))
        return ops.linear(swiglu(gate, up), nn.read(self.w_down, x.dtype))


class ShortConv(nn.Module):
    """x plus a causal depthwise convolution of it over the last `taps` tokens of the document.

    Shapes: x [B, L, D], segments [B, L] -> [B, L, D].
    Source: the shift of H3 (2212.14052); before attention as in Zoology (2312.04927).
    Differs: added to its input, so that taps of zero change nothing; no bias, no activation.
    """

    def __init__(self, taps: int, width: int, keys: nn.Keys):
        self.taps = nn.param(keys, (taps, width), ("W", "D"), std=taps**-0.5)

    def __call__(
        self, x: Float[Array, "B L D"], segments: Int[AnyArray, "B L"]
    ) -> Float[Array, "B L D"]:
        L = x.shape[1]
        taps = nn.read(self.taps)
        x32 = x.astype(wide(x.dtype))
        total = x32
        for back in range(min(len(taps), L)):
            lead = ((0, 0), (back, 0))
            same = jnp.pad(segments, lead)[:, :L] == segments
            earlier = jnp.pad(x32, (*lead, (0, 0)))[:, :L]
            total = total + _along_last(taps[back], x32) * jnp.where(same[..., None], earlier, 0.0)
        return materialise(narrow(total, x.dtype))

    def decode(
        self, x_Bx1xD: Float[Array, "B 1 D"], past_BxWxD: Float[Array, "B W D"]
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B W D"]]:
        """One token after the `taps - 1` inputs before it, zero before the first; and the next."""
        window = jnp.concatenate([past_BxWxD.astype(x_Bx1xD.dtype), x_Bx1xD], axis=1)
        taps = nn.read(self.taps)
        x32 = window.astype(wide(x_Bx1xD.dtype))
        y = x32[:, -1:] + jnp.einsum("bwd,wd->bd", x32, taps[::-1].astype(x32.dtype))[:, None]
        return narrow(y, x_Bx1xD.dtype), window[:, 1:].astype(past_BxWxD.dtype)


@jax.custom_vjp
def embed(
    table_VxD: Float[Array, "V D"], tokens_BxL: Int[AnyArray, "B L"]
) -> Float[Array, "B L D"]:
    """Rows of the table; the gradient is added up in float32."""
    return table_VxD[tokens_BxL]


def _embed_forward(table, tokens):
    return embed(table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _embed_backward(residuals, dy):
    tokens, shape = residuals
    rows = dy.reshape(-1, dy.shape[-1]).astype(shape.dtype)
    zeros = jnp.zeros((shape.shape[0], dy.shape[-1]), shape.dtype)
    return zeros.at[tokens.reshape(-1)].add(rows), None


embed.defvjp(_embed_forward, _embed_backward)
