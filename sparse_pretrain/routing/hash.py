"""Hash routing: a token's experts are a fixed function of the token itself."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.routing import base
from sparse_pretrain.shapes import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`salt` picks the function; weights come from `score` as in DeepSeek-V4's first layers."""

    KIND: ClassVar[str] = "hash"
    causal: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    salt: int = 0
    score: str = "sqrt_softplus"
    balance: float = 0.0
    scale: float = 1.0
    normalise: bool = True

    def __post_init__(self):
        base.check_score(self.score)
        spec.positive(self, "scale")
        spec.require(0 <= self.salt < 2**31, f"salt: must be in [0, 2^31), got {self.salt}")
        spec.require(self.balance >= 0, f"balance: must not be negative, got {self.balance}")

    def check(self, experts: int, top_k: int) -> None:
        """Errors: ValueError when there are fewer experts than top_k."""
        spec.require(top_k <= experts, f"top_k: {top_k} exceeds experts {experts}")


def experts_of(
    tokens_T: Int[AnyArray, " T"], experts: int, top_k: int, salt: int
) -> Int[Array, "T C"]:
    """The top_k different experts of every token id."""
    token = base.mixed(jnp.asarray(tokens_T).astype(jnp.uint32) ^ jnp.uint32(salt))
    expert = base.mixed(jnp.arange(experts, dtype=jnp.uint32) + jnp.uint32(0x9E3779B9))
    draw = base.mixed(token[:, None] ^ expert[None, :])
    # 24 bits are exact in float32; equal draws go to the lower expert
    return base.top_k((draw >> jnp.uint32(8)).astype(jnp.float32), top_k)


class Hash(nn.Module):
    """A fixed random set of experts per token id; the weights of the set are learned.

    Source: Hash Layers 2106.04426; DeepSeek-V4 2606.19348 keeps learned weights.
    Differs: the set is drawn by a hash and not read from a table, so any vocabulary works; V4's
    table is balanced by token frequency, this one only over token ids.
    """

    Config = Config

    def __init__(self, config: Config, width: int, experts: int, top_k: int, keys: nn.Keys):
        config.check(experts, top_k)
        self.config, self.top_k = config, top_k
        self.w = nn.param(keys, (width, experts), ("D", "E"), std=width**-0.5)

    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        valid_BxL: Bool[AnyArray, "B L"],
        tokens_BxL: Int[AnyArray, "B L"] | None = None,
        *,
        train: bool = True,
    ) -> base.Assignment:
        del train
        assert tokens_BxL is not None, "hash routing needs the token ids"
        c, w = self.config, nn.read(self.w)
        score = base.score(c.score, base.logits(x_BxLxD, w))
        tokens = jnp.reshape(jnp.asarray(tokens_BxL), (-1,))
        expert = experts_of(tokens, w.shape[1], self.top_k, c.salt)
        return base.assign(expert, score, valid_BxL, c, self.top_k)
