"""Expert choice: every expert takes the tokens that want it most, the same number each."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.games import prices
from sparse_pretrain.routing import base
from sparse_pretrain.shapes import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`seats`: experts that can take the same token, 0 for twice top_k; a token that more want
    keeps those with the highest score. `memory`: share of the old cut-off kept per step.
    """

    KIND: ClassVar[str] = "expert_choice"
    causal: ClassVar[bool] = False  # in training; held-out text is not read ahead
    exact: ClassVar[bool] = False  # a token gets any number of experts

    seats: int = 0
    score: str = "softmax"
    memory: float = 0.9
    balance: float = 0.0
    scale: float = 1.0
    normalise: bool = False

    def __post_init__(self):
        base.check_score(self.score)
        spec.positive(self, "scale")
        for name in ("seats", "balance"):
            value = getattr(self, name)
            spec.require(value >= 0, f"{name}: must not be negative, got {value}")
        spec.require(0 <= self.memory < 1, f"memory: must be in [0, 1), got {self.memory}")

    def check(self, experts: int, top_k: int) -> None:
        """Errors: ValueError when seats do not lie between top_k, below the experts, and those."""
        spec.require(top_k <= experts, f"top_k: {top_k} exceeds experts {experts}")
        spec.require(
            top_k < experts,
            f"top_k: {top_k} of {experts} experts leave expert_choice nothing to choose",
        )
        spec.require(
            top_k <= self.most_seats(experts, top_k) <= experts,
            f"router.seats: {self.seats} is not between top_k {top_k} and experts {experts}",
        )

    def most_seats(self, experts: int, top_k: int) -> int:
        """Experts that one token can have."""
        return self.seats or min(experts, 2 * top_k)


class ExpertChoice(nn.Module):
    """Each expert takes the c = m k / n tokens with its highest scores.

    A token may get no expert or many. Training reads the whole batch, later tokens too, which
    leaks them (2408.15664 section 5.2). Held-out text is routed causally: an expert takes a token
    whose score is above the running mean of its cut-off.
    Source: 2202.09368, equations 1 to 3. Differs: the cut-off for text that may not be read ahead.
    """

    Config = Config

    def __init__(self, config: Config, width: int, experts: int, top_k: int, keys: nn.Keys):
        config.check(experts, top_k)
        self.config, self.top_k = config, top_k
        self.w = nn.param(keys, (width, experts), ("D", "E"), std=width**-0.5)
        self.price = nn.price((experts,), ("E",))

    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        valid_BxL: Bool[AnyArray, "B L"],
        tokens_BxL: Int[AnyArray, "B L"] | None = None,
        *,
        train: bool = True,
    ) -> base.Assignment:
        del tokens_BxL
        c, k = self.config, self.top_k
        score = base.score(c.score, base.logits(x_BxLxD, nn.read(self.w)))
        experts = score.shape[1]
        valid = jnp.reshape(jnp.asarray(valid_BxL), (-1,))
        fixed, stored = jax.lax.stop_gradient(score), nn.read(self.price)
        cut, proposal = stored, jnp.zeros_like(stored)
        if train:
            proposal = cut = base.of_tokens(prices.threshold(fixed, k, valid), stored, valid)
        expert = base.buy_above(fixed, cut, c.most_seats(experts, k))
        return base.assign(expert, score, valid_BxL, c, k, proposal=proposal, price=cut)

    @staticmethod
    def move(
        config: Config, state: dict, load: Float[Array, "*N E"], proposal: Float[Array, "*N E"]
    ) -> dict:
        """The cut-offs after one optimizer step."""
        del load
        return {"price": config.memory * state["price"] + (1 - config.memory) * proposal}
