"""DeepSeek-style mixture of experts: shared and fine-grained routed experts, dropless."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Bool, Float

from sparse_pretrain import nn, spec
from sparse_pretrain.model import layers
from sparse_pretrain.routing import TABLE, base, dispatch, sigmoid_bias
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`hidden` is one expert's width; `shared` experts of that width see every token."""

    KIND: ClassVar[str] = "moe"

    experts: int = 16
    top_k: int = 2
    hidden: int = 128
    shared: int = 1
    router: spec.Config = sigmoid_bias.Config()

    def __post_init__(self):
        spec.positive(self, "experts", "top_k", "hidden")
        spec.at_most(self, 2**20, "experts", "shared")
        spec.at_most(self, 2**24, "hidden")
        spec.require(self.shared >= 0, f"shared: must not be negative, got {self.shared}")
        spec.require(
            self.top_k <= self.experts, f"top_k: {self.top_k} exceeds experts {self.experts}"
        )
        self.router.check(self.experts, self.top_k)


class MoE(nn.Module):
    """sum over shared experts + weighted sum over the routed experts a token chose.

    Shapes: x [B, L, D], valid [B, L] -> (y [B, L, D], load [E], balance []).
    Source: 2401.06066; 2412.19437 equations 12 to 16.
    """

    Config = Config

    def __init__(self, config: Config, width: int, keys: nn.Keys, *, out_gain: float = 1.0):
        E, F = config.experts, config.hidden
        self.experts = E
        router = TABLE[config.router.KIND]
        self.router = router(config.router, width, E, config.top_k, keys)
        self.w_gate = nn.param(keys, (E, width, F), ("E", "D", "F"), std=width**-0.5)
        self.w_up = nn.param(keys, (E, width, F), ("E", "D", "F"), std=width**-0.5)
        self.w_down = nn.param(keys, (E, F, width), ("E", "F", "D"), std=out_gain * F**-0.5)
        self.shared: layers.SwiGLU | None = (
            layers.SwiGLU(width, F * config.shared, keys, out_gain=out_gain)
            if config.shared
            else None
        )

    def __call__(
        self, x: Float[Array, "B L D"], valid: Bool[AnyArray, "B L"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, " E"], Float[Array, ""]]:
        assignment = self.router(x, valid)
        x_TxD = x.reshape(-1, x.shape[-1])
        plan = dispatch.plan(assignment.expert, self.experts)
        rows = dispatch.dispatch(x_TxD, plan)
        gate = ops.grouped_linear(rows, nn.read(self.w_gate), plan.layout)
        up = ops.grouped_linear(rows, nn.read(self.w_up), plan.layout)
        rows = ops.grouped_linear(layers.swiglu(gate, up), nn.read(self.w_down), plan.layout)
        y = dispatch.combine(rows, assignment.weight, plan).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        load = base.count_load(assignment.expert, self.experts)
        return y, load, assignment.balance

    @staticmethod
    def work(config: Config, width: int) -> float:
        """Forward FLOPs per token: gate, active experts."""
        active = config.top_k + config.shared
        return 2.0 * width * config.experts + 6.0 * width * config.hidden * active

    @staticmethod
    def padding(config: Config, width: int, tokens: int) -> float:
        """Forward FLOPs per token on rows without a pair, in a batch of `tokens`."""
        pairs = tokens * config.top_k
        rows, _ = ops.group_rows(pairs, config.experts)
        return 6.0 * width * config.hidden * (rows - pairs) / tokens

    @staticmethod
    def inactive(config: Config, width: int) -> int:
        """Parameters a token does not touch."""
        return (config.experts - config.top_k) * 3 * width * config.hidden
