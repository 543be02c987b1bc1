"""The experts themselves: every token through those it is assigned, on one device."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from sparse_pretrain.model import layers
from sparse_pretrain.routing import dispatch
from sparse_pretrain.sharding import ops


class Weights(NamedTuple):
    """SwiGLU experts. Shapes: gate, up [E, D, F]; down [E, F, D]."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


def run(
    weights: Weights,
    x_TxD: Float[Array, "T D"],
    expert_TxC: Int[Array, "T C"],
    weight_TxC: Float[Array, "T C"],
) -> Float[Array, "T D"]:
    """Per token, the weighted sum of its experts' outputs; expert E is none. In x's dtype."""
    plan = dispatch.plan(expert_TxC, weights.gate.shape[0])
    rows = dispatch.dispatch(x_TxD, plan)
    rows = ops.grouped_swiglu(rows, weights.gate, weights.up, plan.layout, layers.swiglu)
    rows = ops.grouped_linear(rows, weights.down, plan.layout)
    return dispatch.combine(rows, weight_TxC, plan)
