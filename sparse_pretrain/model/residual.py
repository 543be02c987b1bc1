"""What carries a token from layer to layer: one stream, or several that are mixed at every site.

A site stands around an attention or a feed-forward layer: it says what the layer reads and how its
output comes back.
"""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(spec.Config):
    """One stream: x + layer(x)."""

    KIND: ClassVar[str] = "plain"

    streams: ClassVar[int] = 1


PLAIN = PlainConfig()


MIXINGS = ("sinkhorn", "permutations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MHCConfig(spec.Config):
    """Several streams, mixed by matrices whose rows and columns sum to one.

    `mixing` makes these: `sinkhorn`, so many `iterations` of it, the first of them a softmax over
    rows; or `permutations`, the mean of all of the streams by a softmax's weights (mHC-lite).
    `post` is the largest weight by which an output enters a stream; `scale` what the three
    input-dependent parts start at.
    """

    KIND: ClassVar[str] = "mhc"

    streams: int = 4
    mixing: str = "sinkhorn"
    iterations: int = 20  # as the models have it; DeepSeek's kernels default to 10 and post 1.0
    post: float = 2.0
    scale: float = 0.01
    eps: float = 1e-6

    def __post_init__(self):
        spec.require(2 <= self.streams <= 16, f"streams: must be 2 to 16, got {self.streams}")
        known = self.mixing in MIXINGS
        spec.require(known, f"mixing: {self.mixing!r} is not one of {', '.join(MIXINGS)}")
        few = self.mixing == "sinkhorn" or self.streams <= 5
        spec.require(few, f"streams: must be 2 to 5 for mixing='permutations', got {self.streams}: "
                          f"there are {math.factorial(self.streams)} permutations of them")
        ok = 1 <= self.iterations <= 100
        spec.require(ok, f"iterations: must be 1 to 100, got {self.iterations}")
        spec.positive(self, "post", "scale", "eps")

    @property
    def logits(self) -> int:
        """Numbers that a mixing matrix is made of."""
        R = self.streams
        return R * R if self.mixing == "sinkhorn" else math.factorial(R)


class Plain:
    """Nothing but the sum. Shapes: x [B, L, D]."""

    Config = PlainConfig

    @staticmethod
    def work(config: PlainConfig, width: int) -> float:
        """Forward FLOPs per token of one site."""
        del config, width
        return 0.0

    @staticmethod
    def head_work(config: PlainConfig, width: int) -> float:
        """Forward FLOPs per token of the end."""
        del config, width
        return 0.0


class MHC:
    """Manifold-constrained hyper-connections. Shapes: x [B, L, R, D] of R streams.

    Source: 2512.24880, equations 7 and 8; order and constants of the released code. Of
    `permutations`: 2601.05732 (mHC-lite).
    """

    Config = MHCConfig

    @staticmethod
    def work(config: MHCConfig, width: int) -> float:
        """Forward FLOPs per token of one site: mixing numbers, what is read, what is written."""
        R, logits = config.streams, config.logits
        made = 0.0 if config.mixing == "sinkhorn" else 2.0 * logits * R * R
        return 2.0 * R * width * (2 * R + logits) + 4.0 * R * width + 2.0 * R * R * width + made

    @staticmethod
    def head_work(config: MHCConfig, width: int) -> float:
        """Forward FLOPs per token of the end: its mixing numbers and the sum."""
        return 2.0 * config.streams * width * (config.streams + 1)


TABLE = {"plain": Plain, "mhc": MHC}


def spread(config: Any, x: Float[Array, "B L D"]) -> Array:
    """Every stream as the embedding, where there are several."""
    if config.KIND == "plain":
        return x
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], config.streams, x.shape[-1]))


def end(config: Any, width: int, keys: nn.Keys, *, eps: float) -> "End | None":
    """What makes one stream of several; None where there is one."""
    return None if config.KIND == "plain" else End(config, width, keys, eps=eps)


def _mixing(x_BxLxRxD, w, numbers: int, eps: float):
    """Input-dependent numbers [B, L, numbers] of the streams side by side, float32."""
    flat = x_BxLxRxD.reshape(*x_BxLxRxD.shape[:2], -1).astype(layers.wide(x_BxLxRxD.dtype))
    normal = flat * jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)
    assert w.shape[-1] == numbers, (w.shape, numbers)
    return ops.linear(normal, w.astype(normal.dtype))


def _weighted(weight_BxLxR, x_BxLxRxD):
    """Sum over streams; unrolled, so that XLA fuses it instead of calling a tiny product."""
    terms = (weight_BxLxR[..., r, None] * x_BxLxRxD[..., r, :] for r in range(x_BxLxRxD.shape[2]))
    return sum(terms)


def _mean_permutation(logits, streams: int):
    """Doubly stochastic matrices [B, L, R, R] as means of permutations: every one's logit.

    Logit p is that of the p-th permutation in the order of itertools, which takes stream m to
    stream permutation[m]. All lie in the hull of permutations (Birkhoff), so that none is left out.
    """
    of = np.array(list(itertools.permutations(range(streams))))
    matrices = np.eye(streams, dtype=np.float32)[of].reshape(len(of), -1)
    made = jax.nn.softmax(logits, axis=-1) @ jnp.asarray(matrices, logits.dtype)
    return made.reshape(*logits.shape[:2], streams, streams)


class Site(nn.Module):
    """Mixing around one layer.

    Shapes: x [B, L, R, D].
    """

    def __init__(self, config: MHCConfig, width: int, keys: nn.Keys, *, eps: float):
        self.config, self.eps = config, eps
        R = config.streams
        numbers = 2 * R + config.logits
        self.w = nn.param(keys, (R * width, numbers), ("RD", "Mix"), std=(R * width) ** -0.5)
        self.base = nn.param(keys, (numbers,), ("Mix",), value=0.0)
        self.scale = nn.param(keys, (3,), ("Part",), value=config.scale)

    def open(self, x: Float[Array, "B L R D"]) -> tuple[Float[Array, "B L D"], Any]:
        """(what the layer reads, what `close` needs)."""
        c, R = self.config, self.config.streams
        numbers = 2 * R + c.logits
        mixed = _mixing(x, nn.read(self.w), numbers, self.eps)
        scale, base = (nn.read(p).astype(mixed.dtype) for p in (self.scale, self.base))
        sizes = jnp.repeat(scale, jnp.array([R, R, c.logits]), total_repeat_length=numbers)
        mixed = mixed * sizes[None, None] + base[None, None]
        pre = jax.nn.sigmoid(mixed[..., :R]) + c.eps
        post = c.post * jax.nn.sigmoid(mixed[..., R : 2 * R])
        logits = mixed[..., 2 * R :]
        if c.mixing == "permutations":
            across = _mean_permutation(logits, R)
        else:
            square = logits.reshape(*mixed.shape[:2], R, R)
            across = ops.sinkhorn(square, iterations=c.iterations, eps=c.eps)
        wide = x.astype(mixed.dtype)
        return _weighted(pre, wide).astype(x.dtype), (wide, across, post)

    def close(self, held: Any, y: Float[Array, "B L D"]) -> Float[Array, "B L R D"]:
        """Stream n: the sum over m of B[m, n] x_m, and y by its weight."""
        wide, across, post = held
        y32, R = y.astype(wide.dtype), self.config.streams
        streams = [_weighted(across[..., n], wide) + post[..., n, None] * y32 for n in range(R)]
        return jnp.stack(streams, axis=2).astype(y.dtype)


class End(nn.Module):
    """The streams as one, before the last norm. Shapes: [B, L, R, D] -> [B, L, D]."""

    def __init__(self, config: MHCConfig, width: int, keys: nn.Keys, *, eps: float):
        self.config, self.eps = config, eps
        R = config.streams
        self.w = nn.param(keys, (R * width, R), ("RD", "Mix"), std=(R * width) ** -0.5)
        self.base = nn.param(keys, (R,), ("Mix",), value=0.0)
        self.scale = nn.param(keys, (1,), ("Part",), value=config.scale)

    def __call__(self, x: Float[Array, "B L R D"]) -> Float[Array, "B L D"]:
        mixed = _mixing(x, nn.read(self.w), self.config.streams, self.eps)
        scale, base = (nn.read(p).astype(mixed.dtype) for p in (self.scale, self.base))
        pre = jax.nn.sigmoid(mixed * scale[None, None] + base[None, None]) + self.config.eps
        return _weighted(pre, x.astype(mixed.dtype)).astype(x.dtype)
