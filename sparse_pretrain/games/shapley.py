"""In-run credit: what each sequence of a step adds to the fall of a loss that it is not part of.

To first order the game of a gradient step is additive, so that a player's Shapley value is what its
own gradient adds: rate x <gradient of the target's loss, gradient of the player's loss>. Credits of
all sequences sum to what the whole step is worth.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_pretrain import spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """Every `every` steps, from the step `every` on; 0 measures nothing.

    The target is held-out text, or the text of the file `text`.
    Units: `every` steps; `tokens` targets of the target, rounded up to whole batches.
    """

    every: int = 0
    tokens: int = 4096
    text: str = ""
    experts: bool = False

    def __post_init__(self):
        spec.require(self.every >= 0, f"every: must be 0 or more, got {self.every}")
        spec.positive(self, "tokens")

    def check(self, plan: str, mixture: str, blocks: Mapping[str, Any]) -> None:
        """Errors: ValueError naming the field of what has no exact credit."""
        if not self.every:
            ok = mixture != "doge"
            spec.require(ok, "credit.every: 0, but data.mixture.kind doge goes by credit")
            return
        spec.require(
            plan in ("single", "auto"),
            f"credit.every: {self.every} takes the gradient of one sequence at a time on one "
            f"device, under plan=single; got plan {plan}",
        )
        for name, block in blocks.items():
            copies = getattr(block.ffn, "copies", 0)
            spec.require(
                not copies,
                f"credit.every: {self.every} with model.blocks.{name}.ffn.copies {copies}, which "
                "hold parts of one gradient",
            )


def first_order(
    loss: Callable[[Any, Any], Array],
    params: Any,
    rows: Any,
    target: Any,
    parts: Callable[[Any], Any] | None = None,
) -> tuple[Float[Array, " B"], Any]:
    """<target, gradient of loss(params, row)> of every row, and sums over rows of its parts.

    One backward pass a row, with a row's leading dim of 1: as many products as the batch's own
    gradient takes, and one more gradient in memory. `parts(products)` says what to keep of the
    products of each pair of leaves, such as sums by expert.
    Shapes: leaves of `rows` [B, ...]; `target` like `params`.
    Source: 2406.11011, equation 5 and section 4.1, where a "ghost dot product" takes the same from
        inputs and output gradients of every layer.
    """

    def products(row):
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda a, b: a * b, grads, target)

    def one(kept, row):
        found = products(row)
        more = {} if parts is None else parts(found)
        return jax.tree.map(jnp.add, kept, more), sum(map(jnp.sum, jax.tree.leaves(found)))

    first = jax.tree.map(lambda x: x[0], rows)
    like = {} if parts is None else jax.eval_shape(lambda r: parts(products(r)), first)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    kept, credit = jax.lax.scan(one, start, rows)
    return credit, kept


def by_expert(products: Any, dims: Any) -> dict[str, Array]:
    """Sums over the numbers of each expert: dotted name of a layer -> [E], or [N, E] of a stack.

    Shapes: `products` like the parameters, `dims` with a tuple of names at each leaf. Only what
    every expert has of its own counts, not the router's columns.
    """
    found: dict[str, Array] = {}
    for name, part in products.items():
        leaves = jax.tree.leaves(part)
        names = jax.tree.leaves(dims[name], is_leaf=lambda x: isinstance(x, tuple))
        for leaf, own in zip(leaves, names, strict=True):
            lead = own.index("E") + 1 if "E" in own else 0
            if 0 < lead <= 2 and len(own) - lead >= 2:
                sums = jnp.sum(leaf, axis=tuple(range(lead, leaf.ndim)))
                found[name] = found.get(name, 0.0) + sums
    return found


def by_group(
    credit_B: Float[np.ndarray, " B"], group_B: Int[np.ndarray, " B"], groups: int
) -> Float[np.ndarray, " K"]:
    """Sums of credits by group. Shapes: `group` in [0, groups)."""
    found = np.zeros(groups)
    np.add.at(found, group_B, credit_B)
    return found
