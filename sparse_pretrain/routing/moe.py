"""DeepSeek-style mixture of experts: shared and fine-grained routed experts, dropless."""

import dataclasses
import math
from typing import ClassVar

import jax
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, spec
from sparse_pretrain.model import layers
from sparse_pretrain.routing import TABLE, base, copies, expert_parallel, experts, sigmoid_bias
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`hidden` is one expert's width; `shared` experts of that width see every token.

    `capacity` above 0 bounds an expert's pairs in training to that multiple of the even share;
    pairs past it are dropped, lowest weights first. 0, the default, drops nothing.
    `copies` are slots beyond one per expert, for second copies of busy experts; a copy is no
    parameter of its own, and which expert it holds is data (`training.replace` moves them).
    """

    KIND: ClassVar[str] = "moe"

    experts: int = 16
    top_k: int = 2
    hidden: int = 128
    shared: int = 1
    capacity: float = 0.0
    copies: int = 0
    router: spec.Config = sigmoid_bias.Config()

    def __post_init__(self):
        spec.positive(self, "experts", "top_k", "hidden")
        spec.at_most(self, 2**20, "experts", "shared", "copies")
        spec.at_most(self, 2**24, "hidden")
        spec.require(self.shared >= 0, f"shared: must not be negative, got {self.shared}")
        spec.require(self.copies >= 0, f"copies: must not be negative, got {self.copies}")
        spec.require(self.capacity >= 0, f"capacity: must not be negative, got {self.capacity}")
        spec.require(
            self.top_k <= self.experts, f"top_k: {self.top_k} exceeds experts {self.experts}"
        )
        self.router.check(self.experts, self.top_k)


class MoE(nn.Module):
    """sum over shared experts + weighted sum over the routed experts a token chose.

    Shapes: x [B, L, D], valid and tokens [B, L] -> (y [B, L, D], Report).
    Source: 2401.06066; 2412.19437 equations 12 to 16.
    """

    Config = Config

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        E, F = config.experts, config.hidden
        self.config = config
        router = TABLE[config.router.KIND]
        self.router = router(config.router, width, E, config.top_k, keys)
        # slot r starts with expert r modulo E
        held = [r % E for r in range(E + config.copies)] if config.copies else None
        up, down = ("E", "D", "F"), ("E", "F", "D")
        self.w_gate = nn.param(keys, (E, width, F), up, std=width**-0.5, take=held)
        self.w_up = nn.param(keys, (E, width, F), up, std=width**-0.5, take=held)
        self.w_down = nn.param(keys, (E, F, width), down, std=out_gain * F**-0.5, take=held)
        if held:
            self.phy2log = nn.numbers(held, ("E",))
        self.shared: layers.SwiGLU | None = (
            layers.SwiGLU(width, F * config.shared, keys, out_gain=out_gain)
            if config.shared
            else None
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        valid: Bool[AnyArray, "B L"],
        tokens: Int[AnyArray, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B L D"], base.Report]:
        c = self.config
        assignment = self.router(x, valid, tokens, train=train)
        if c.capacity and train:
            seats = math.ceil(c.capacity * x.shape[0] * x.shape[1] * c.top_k / c.experts)
            weight = jax.lax.stop_gradient(assignment.weight)
            expert = base.within_capacity(assignment.expert, weight, c.experts, seats)
            assignment = assignment._replace(expert=expert)
        held = self.w_gate, self.w_up, self.w_down
        weights = experts.Weights(*(nn.read(w, x.dtype) for w in held))
        expert = assignment.expert
        if c.copies:
            found = copies.slots(nn.read(self.phy2log), c.experts)
            expert = copies.choose(expert, found)
        y = expert_parallel.everywhere(weights, x, expert, assignment.weight)
        if self.shared is not None:
            y = y + self.shared(x)
        load = base.count_load(assignment.expert, c.experts)
        market = base.market_sums(assignment.market, valid)
        return y, base.Report(load, assignment.balance, market)

    @staticmethod
    def work(config: Config, width: int) -> float:
        """Forward FLOPs per token: gate, active experts."""
        active = config.top_k + config.shared
        return 2.0 * width * config.experts + 6.0 * width * config.hidden * active

    @staticmethod
    def plain(config: Config, width: int) -> float:
        """The part of `work` in products without a batch dim: not the routed experts'."""
        return 2.0 * width * config.experts + 6.0 * width * config.hidden * config.shared

    @staticmethod
    def unread(config: Config, width: int) -> float:
        """The part of `work` in products whose result no gradient reads: the shared experts' last.

        The routed experts' last is read, by the gradient of their weights.
        """
        return 2.0 * width * config.hidden * config.shared

    @staticmethod
    def padding(config: Config, width: int, tokens: int) -> float:
        """Forward FLOPs per token on rows without a pair, in a batch of `tokens`."""
        seats = config.top_k
        if hasattr(config.router, "most_seats"):
            seats = config.router.most_seats(config.experts, config.top_k)
        rows, _ = ops.group_rows(tokens * seats, config.experts + config.copies)
        return 6.0 * width * config.hidden * (rows - tokens * config.top_k) / tokens

    @staticmethod
    def inactive(config: Config, width: int) -> int:
        """Parameters a token does not touch."""
        return (config.experts - config.top_k) * 3 * width * config.hidden

    @staticmethod
    def copied(config: Config, width: int) -> int:
        """Numbers held a second time, which are no parameters."""
        return config.copies * 3 * width * config.hidden
