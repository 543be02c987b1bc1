"""In which numbers the products of a model's layers are taken."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from sparse_pretrain import spec
from sparse_pretrain.sharding import ops

PRODUCTS = ("model", "fp8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`products=fp8` takes the three products of every linear layer and expert in E4M3.

    `model` takes them in the model's dtype; with `power_of_two` scales are powers of two.
    Embedding, head, routers, norms, residual mixing and attention's own products stay as they are.
    Source: DeepSeek-V3 (2412.19437), section 3.3.
    Differs: activations are kept for the backward pass in the model's dtype, and moments in
        float32.
    """

    products: str = "model"
    power_of_two: bool = False

    def __post_init__(self):
        known = ", ".join(PRODUCTS)
        ok = self.products in PRODUCTS
        spec.require(ok, f"products: {self.products!r} is not one of {known}")


def kept(function: Callable) -> Callable:
    """The function of a model, traced in the precision of its configuration."""

    @functools.wraps(function)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        c = model.config.precision
        with ops.eight_bits(c.products == "fp8", power_of_two=c.power_of_two):
            return function(model, *args, **kwargs)

    return run
