"""The layers of a pipeline's stage forward and back, products for weights left for later."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain.sharding.halves import Halves, halves


class Backward(NamedTuple):
    """How to go back through one layer, known once its forward pass is traced.

    `pull` is the structure of its pullback, whose leaves are saved, or `given`: (which leaf of what
    the layer is given) where they are that; the halves are there once its backward pass is traced.
    """

    pull: Any
    given: tuple[int | None, ...]
    halves: Halves | None = None


class Stage:
    """Layers of which `layer((x, sums), (params, more) of one layer) -> ((x, sums), told)`.

    Shapes: the leaves of `params` and `more` lead with the layers, and so do those of what is saved
    and kept.
    """

    def __init__(self, layer: Callable[..., Any], params: Any, more: Any):
        self._layer, self._arrays = layer, (params, more)
        self._how: Backward | None = None

    def forward(self, carry: Any) -> tuple[Any, Any, Any]:
        """((x, sums), told, what `backward` is to be given)."""

        def one(carry, arrays):
            params, more = arrays

            def run(params, carry):
                return self._layer(carry, (params, more))

            carry, pull, told = jax.vjp(run, params, carry, has_aux=True)
            leaves, structure = jax.tree.flatten(pull)
            there = jax.tree.leaves(arrays)
            given = tuple(next((i for i, a in enumerate(there) if a is x), None) for x in leaves)
            self._how = Backward(structure, given)
            return carry, (told, [x for x, i in zip(leaves, given, strict=True) if i is None])

        carry, (told, saved) = jax.lax.scan(one, carry, self._arrays)
        return carry, told, saved

    def backward(self, saved: Any, carry: Any) -> tuple[Any, list[Any], Any]:
        """(the gradient of x and sums from that of the last ones, those of the parameters' leaves
        that do not wait and None for others, what `weights` is to be given).
        """
        how = self._how
        assert how is not None, "forward is traced first"
        count = self._count

        def one(carry, xs):
            saved, arrays = xs
            there, rest = jax.tree.leaves(arrays), iter(saved)
            leaves = [next(rest) if i is None else there[i] for i in how.given]
            grads, structure = jax.tree.flatten(carry)

            def back(*inputs):
                pull = jax.tree.unflatten(how.pull, inputs[: len(leaves)])
                return jax.tree.leaves(pull(jax.tree.unflatten(structure, inputs[len(leaves) :])))

            made = halves(
                back,
                [*leaves, *grads],
                may_wait=[True] * count + [False] * len(grads),
                there=[i is not None for i in how.given] + [False] * len(grads),
            )
            self._how = how._replace(halves=made)
            now, kept = made.first(*leaves, *grads)
            carry = jax.tree.unflatten(structure, now[len(now) - len(grads) :])
            return carry, (now[: len(now) - len(grads)], kept)

        carry, (now, kept) = jax.lax.scan(one, carry, (saved, self._arrays), reverse=True)
        rest = iter(now)
        return carry, [None if w else next(rest) for w in self._waits], kept

    def weights(self, kept: Any) -> list[Any]:
        """The gradients of the parameters' leaves that wait, and None for others."""
        how = self._how
        assert how is not None, "forward is traced first"
        made = how.halves
        assert made is not None, "backward is traced first"

        def one(_, xs):
            kept, arrays = xs
            there = jax.tree.leaves(arrays)
            places = [how.given[i] for i in made.again]
            return None, made.second(*kept, *(there[i] for i in places if i is not None))

        _, late = jax.lax.scan(one, None, (kept, self._arrays))
        rest = iter(late)
        return [next(rest) if w else None for w in self._waits]

    @property
    def _count(self) -> int:
        return len(jax.tree.leaves(self._arrays[0]))

    @property
    def _waits(self) -> tuple[bool, ...]:
        how = self._how
        made = how and how.halves
        assert made is not None, "backward is traced first"
        return made.waits[: self._count]


def add(total: Any, more: list[Any]) -> Any:
    """The sums with those leaves of `more` that are not None added."""
    leaves, structure = jax.tree.flatten(total)
    both = zip(leaves, more, strict=True)
    return jax.tree.unflatten(structure, [a if b is None else jnp.add(a, b) for a, b in both])
