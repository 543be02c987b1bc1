"""The feed-forward half of a block: dense, or a mixture of experts."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.model.layers import SwiGLU
from sparse_pretrain.routing import base
from sparse_pretrain.routing.moe import MoE
from sparse_pretrain.shapes import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(spec.Config):
    """A SwiGLU of width `hidden`."""

    KIND: ClassVar[str] = "dense"

    hidden: int = 512

    def __post_init__(self):
        spec.positive(self, "hidden")
        spec.at_most(self, 2**24, "hidden")


class Dense(nn.Module):
    """SwiGLU for every token. Shapes: x [B, L, D] -> ([B, L, D], Report without experts)."""

    Config = DenseConfig

    def __init__(self, config: DenseConfig, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        self.mlp = SwiGLU(width, config.hidden, keys, out_gain=out_gain)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        valid: Bool[AnyArray, "B L"],
        tokens: Int[AnyArray, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B L D"], base.Report]:
        del valid, tokens, train
        none = jnp.zeros((0,), jnp.float32)
        return self.mlp(x), base.Report(none, jnp.zeros((), jnp.float32), {})

    @staticmethod
    def work(config: DenseConfig, width: int) -> float:
        """Forward FLOPs per token."""
        return 6.0 * width * config.hidden

    @staticmethod
    def copied(config: DenseConfig, width: int) -> int:
        """Numbers held a second time: none."""
        del config, width
        return 0

    @staticmethod
    def plain(config: DenseConfig, width: int) -> float:
        """The part of `work` in products without a batch dim, which remat=dots keeps: all."""
        return Dense.work(config, width)

    @staticmethod
    def unread(config: DenseConfig, width: int) -> float:
        """The part of `work` in products whose result no gradient reads: the last one."""
        return 2.0 * width * config.hidden

    @staticmethod
    def padding(config: DenseConfig, width: int, tokens: int) -> float:
        """Forward FLOPs per token on padding: none."""
        del config, width, tokens
        return 0.0

    @staticmethod
    def inactive(config: DenseConfig, width: int) -> int:
        """Parameters a token does not touch."""
        del config, width
        return 0


TABLE = {
    "dense": Dense,
    "moe": MoE,
}
