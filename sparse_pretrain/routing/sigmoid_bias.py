"""DeepSeek-V3's router: sigmoid scores, and a bias per expert that moves with the load."""

import dataclasses
import functools
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
    """`rate` moves the bias once per optimizer step; `groups` > 1 limits a token to some groups."""

    KIND: ClassVar[str] = "sigmoid_bias"
    causal: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    rate: float = 0.001
    balance: float = 1e-4
    scale: float = 1.0
    normalise: bool = True
    groups: int = 1
    groups_kept: int = 1

    def __post_init__(self):
        spec.positive(self, "scale", "groups", "groups_kept")
        spec.require(self.rate >= 0, f"rate: must not be negative, got {self.rate}")
        spec.require(self.balance >= 0, f"balance: must not be negative, got {self.balance}")
        spec.require(
            self.groups_kept <= self.groups,
            f"groups_kept: {self.groups_kept} exceeds groups {self.groups}",
        )

    def check(self, experts: int, top_k: int) -> None:
        """Errors: ValueError when experts, groups and top_k do not fit together."""
        base.check_groups(self, experts, top_k)


class SigmoidBias(nn.Module):
    """top-k of sigmoid(x W) + bias; weights are the scores without the bias.

    Source: 2412.19437 sections 2.1.2; 2408.15664.
    Differs: dropped groups are masked with -inf (Transformers 5.0 masks with 0, which lets a
    negative bias lose to a dropped expert).
    """

    Config = Config

    def __init__(self, config: Config, width: int, experts: int, top_k: int, keys: nn.Keys):
        config.check(experts, top_k)
        self.config, self.top_k = config, top_k
        self.w = nn.param(keys, (width, experts), ("D", "E"), std=width**-0.5)
        self.bias = nn.price((experts,), ("E",))

    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        valid_BxL: Bool[AnyArray, "B L"],
        tokens_BxL: Int[AnyArray, "B L"] | None = None,
        *,
        train: bool = True,
    ) -> base.Assignment:
        del tokens_BxL
        score = base.score("sigmoid", base.logits(x_BxLxD, nn.read(self.w)))
        fixed, bias = jax.lax.stop_gradient(score), nn.read(self.bias)
        z, best = fixed + bias[None, :], functools.partial(_best, self.top_k, self.config)
        expert = base.per_token(best, valid_BxL.shape, z)
        market = {"price": -bias}
        if self.config.groups == 1:
            valid = jnp.reshape(jnp.asarray(valid_BxL), (-1,))
            market["objective"] = base.dual_of_choice(fixed, -bias, expert, valid)
            if not train:  # a sort, which a training step is spared
                market["gap"] = base.duality_gap(fixed, -bias, expert, valid)
        return base.assign(expert, score, valid_BxL, self.config, self.top_k, **market)

    @staticmethod
    def move(
        config: Config, state: dict, load_E: Float[Array, "*N E"], proposal: Float[Array, "*N E"]
    ) -> dict:
        """The bias after one optimizer step that saw `load_E` pairs per expert."""
        del proposal
        return {"bias": prices.sign(state["bias"], load_E, config.rate)}


def select(
    score_TxE: Float[Array, "T E"], bias_E: Float[Array, " E"], top_k: int, config: Config
) -> Int[Array, "T C"]:
    """Experts [T, C] int32 with the highest score + bias, within each token's best groups."""
    return _best(top_k, config, score_TxE + bias_E[None, :])


def _best(top_k: int, config: Config, z):
    return base.top_k(base.best_groups(z, config.groups, config.groups_kept, 2), top_k)
