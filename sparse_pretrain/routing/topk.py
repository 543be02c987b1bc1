"""Top-k by score with auxiliary losses: Switch, GShard, Mixtral, OLMoE, DeepSeek-V2."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.routing import base
from sparse_pretrain.shapes import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`aux` weighs the load-balance loss over the batch, `z` the logits' z-loss, `balance` the
    loss per sequence; defaults are OLMoE's. `normalise` makes a token's weights sum to 1, and
    `groups` > 1 limits a token to the groups of its highest scores.
    """

    KIND: ClassVar[str] = "topk"
    causal: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    score: str = "softmax"
    aux: float = 0.01
    z: float = 0.001
    balance: float = 0.0
    scale: float = 1.0
    normalise: bool = False
    groups: int = 1
    groups_kept: int = 1

    def __post_init__(self):
        base.check_score(self.score)
        spec.positive(self, "scale", "groups", "groups_kept")
        spec.require(
            self.groups_kept <= self.groups,
            f"groups_kept: {self.groups_kept} exceeds groups {self.groups}",
        )
        for name in ("aux", "z", "balance"):
            value = getattr(self, name)
            spec.require(value >= 0, f"{name}: must not be negative, got {value}")

    def check(self, experts: int, top_k: int) -> None:
        """Errors: ValueError when experts, groups and top_k do not fit together."""
        base.check_groups(self, experts, top_k)


class TopK(nn.Module):
    """The k experts with the highest score; balance comes from losses alone.

    aux  E sum_e f_e P_e over the tokens it sees: f the share of pairs, P the mean score share.
    z    mean squared logsumexp of the logits.
    With gradient accumulation the auxiliary loss is a micro-batch's, as in Switch it is a device's.
    Source: Switch 2101.03961 equations 4 to 6; ST-MoE 2202.08906 equation 5; OLMoE 2409.02060;
    DeepSeek-V2 2405.04434 section 2.2.
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
        del tokens_BxL, train
        c = self.config
        logits = base.logits(x_BxLxD, nn.read(self.w))
        score = base.score(c.score, logits)

        def best(score):
            return base.top_k(base.best_groups(score, c.groups, c.groups_kept, 1), self.top_k)

        expert = base.per_token(best, valid_BxL.shape, jax.lax.stop_gradient(score))
        found = base.assign(expert, score, valid_BxL, c, self.top_k)
        extra = jnp.zeros((), jnp.float32)
        live = jnp.reshape(jnp.asarray(valid_BxL), (-1,)).astype(jnp.float32)
        tokens = jnp.maximum(jnp.sum(live), 1.0)
        if c.aux:
            experts = score.shape[1]
            load = base.count_load(found.expert, experts)
            share = score / (jnp.sum(score, axis=1, keepdims=True) + 1e-20)
            mean_share = jnp.sum(share * live[:, None], axis=0) / tokens
            extra = extra + c.aux * experts * jnp.sum(load / (tokens * self.top_k) * mean_share)
        if c.z:
            total = jax.nn.logsumexp(logits, axis=1)
            extra = extra + c.z * jnp.sum(jnp.square(total) * live) / tokens
        return found._replace(balance=found.balance + extra)
