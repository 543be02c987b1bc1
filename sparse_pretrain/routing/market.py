"""Experts as a market: any score, and prices by any of the solvers of `games`."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.games import auction, prices
from sparse_pretrain.routing import base
from sparse_pretrain.shapes import AnyArray

# How prices come about. LOADS: moved by the last batch's loads. SCORES: from the last batch's
# scores. BATCH: from the scores of the very batch they route, so a token's experts depend on later
# tokens while training; held-out text is routed by the prices that training left.
LOADS = ("sign", "proportional")
SCORES = ("quantile", "threshold")
BATCH = ("bip", "sinkhorn", "auction")
SOLVERS = LOADS + SCORES + BATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`solver` sets the prices, `score` is what a token bids with.

    `rate` of sign and proportional, per optimizer step. `memory`: share of the old price that
    quantile, threshold and the batch solvers keep (threshold's published value is 0.9).
    `iterations` of bip, sinkhorn and the auction's opening prices, `temperature` of sinkhorn,
    `epsilon` the auction's least raise, `rounds` its most. `share` below 1: the share of batches
    that sinkhorn balances, the others and held-out text going by score alone (selective Sinkhorn,
    2511.08972; differs: weights are the scores and not the plan). `seats`: experts a token can buy
    at most under threshold, whose tokens buy every expert worth more than its price; 0 is twice
    top_k.
    """

    KIND: ClassVar[str] = "market"

    solver: str = "quantile"
    score: str = "sigmoid"
    rate: float = 0.001
    memory: float = 0.0
    iterations: int = 4
    temperature: float = 0.05
    epsilon: float = 0.01
    rounds: int = 200
    seats: int = 0
    share: float = 1.0
    balance: float = 0.0
    scale: float = 1.0
    normalise: bool = True

    def __post_init__(self):
        base.check_score(self.score)
        known = ", ".join(SOLVERS)
        spec.require(self.solver in SOLVERS, f"solver: {self.solver!r} is not one of {known}")
        spec.positive(self, "iterations", "temperature", "epsilon", "rounds", "scale")
        for name in ("rate", "balance", "seats"):
            value = getattr(self, name)
            spec.require(value >= 0, f"{name}: must not be negative, got {value}")
        spec.require(0 <= self.memory < 1, f"memory: must be in [0, 1), got {self.memory}")
        spec.require(0 < self.share <= 1, f"share: must be in (0, 1], got {self.share}")
        spec.require(
            self.share == 1 or self.solver == "sinkhorn",
            f"share: {self.share} goes with solver sinkhorn, not with {self.solver}",
        )

    @property
    def causal(self) -> bool:
        """Whether training reads nothing later than the token."""
        return self.solver not in BATCH

    @property
    def exact(self) -> bool:
        """Whether every token gets top_k experts."""
        return self.solver != "threshold"

    def check(self, experts: int, top_k: int) -> None:
        """Errors: ValueError when experts, seats and top_k do not fit together."""
        spec.require(top_k <= experts, f"top_k: {top_k} exceeds experts {experts}")
        spec.require(
            top_k < experts or self.solver in LOADS,
            f"top_k: {top_k} of {experts} experts leave nothing to price with solver {self.solver}",
        )
        most = self.most_seats(experts, top_k)
        spec.require(
            top_k <= most <= experts,
            f"router.seats: {self.seats} is not between top_k {top_k} and experts {experts}",
        )

    def most_seats(self, experts: int, top_k: int) -> int:
        """Experts that one token can have."""
        if self.solver != "threshold":
            return top_k
        return self.seats or min(experts, 2 * top_k)


class Market(nn.Module):
    """Tokens buy the experts with the highest score - price; weights are scores without prices.

    Source: 2512.03915 reads loss-free balancing as this market; solvers in `games.prices`.
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
        c, k = self.config, self.top_k
        score = base.score(c.score, base.logits(x_BxLxD, nn.read(self.w)))
        valid = jnp.reshape(jnp.asarray(valid_BxL), (-1,))
        fixed, stored = jax.lax.stop_gradient(score), nn.read(self.price)
        price, held, proposal = self._prices(fixed, stored, valid, tokens_BxL, train)
        if c.solver == "threshold":
            expert = base.buy_above(fixed, price, c.most_seats(score.shape[1], k))
        else:
            worth = fixed - price[None, :]
            if held is not None:  # what it won comes first; the rest only if bidding was cut short
                most = jnp.max(jnp.where(valid[:, None], jnp.abs(worth), 0))
                worth = jnp.where(held, most * 3 + 1 + worth, worth)
            best = functools.partial(base.top_k, k=k)
            expert = base.per_token(best, valid_BxL.shape, worth)
        told = {
            name: base.of_tokens(found, stored, valid)
            for name, found in (("proposal", proposal), ("price", price))
        }
        told["objective"] = prices.dual(fixed, price, k, valid)
        if c.exact and not train:  # a sort, which a training step is spared
            told["gap"] = base.duality_gap(fixed, price, expert, valid)
        return base.assign(expert, score, valid_BxL, c, k, **told)

    def _prices(self, score, stored, valid, tokens, train: bool):
        """(prices to route by [E], who holds a seat [T, E] or None, proposal for the next [E])."""
        c, k = self.config, self.top_k
        if not train or c.solver in LOADS:
            return stored, None, jnp.zeros_like(stored)
        if c.solver == "quantile":
            return stored, None, prices.quantile(score, stored, k, valid)
        if c.solver == "threshold":
            return stored, None, prices.threshold(score, k, valid)
        if c.solver == "bip":
            price = prices.bip(score, stored, k, valid, c.iterations)
            return price, None, price
        if c.solver == "sinkhorn" and c.share < 1:
            assert tokens is not None, "selective Sinkhorn draws its batches by their tokens"

            def plan(score):
                return prices.sinkhorn(score, k, valid, c.temperature, c.iterations)

            none = jnp.zeros_like(stored)
            chosen = base.drawn(tokens, c.share)
            return jax.lax.cond(chosen, plan, lambda s: none, score), None, none
        if c.solver == "sinkhorn":
            price = prices.sinkhorn(score, k, valid, c.temperature, c.iterations)
            return price, None, price
        T, E = score.shape
        start = stored  # near the end prices there is ten times less to bid about than from zero
        for _ in range(c.iterations):
            start = prices.quantile(score, start, k, valid)
        sold = auction.auction(
            score,
            k,
            -(-T * k // E),
            valid,
            epsilon=c.epsilon,
            rounds=c.rounds,
            start_E=start - jnp.min(start),
        )
        return sold.price, sold.held, sold.price

    @staticmethod
    def move(
        config: Config, state: dict, load: Float[Array, "*N E"], proposal: Float[Array, "*N E"]
    ) -> dict:
        """The prices after one optimizer step with these loads and proposed prices."""
        old = state["price"]
        if config.solver in LOADS:
            rule = getattr(prices, config.solver)
            return {"price": -rule(-old, load, config.rate)}
        return {"price": config.memory * old + (1 - config.memory) * proposal}
