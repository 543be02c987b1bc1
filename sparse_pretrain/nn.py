"""The only file that imports flax: modules hold parameters, everything else is plain functions.

NNX is used where its graph and tree modes agree: Module, Param, one Variable kind for router
prices, split and merge. Outside this file a model is a `Definition` and two plain nested dicts of
arrays, so jit, grad, scan, optax and orbax see nothing of flax.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_pretrain.sharding import apply, ops, pipeline

Module = nnx.Module


class Price(nnx.Variable):
    """A router's price vector or its experts' slots: what moves with the load, not by gradients."""


class Keys:
    """Hands out a fresh random key at each call, in a fixed order.

    `gain`, where it is set, says by dimension names what initial deviations are multiplied with.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0
        self.gain: Callable[[tuple[str, ...]], float] | None = None

    def __call__(self) -> jax.Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def param(
    keys: Keys,
    shape: Sequence[int],
    dims: Sequence[str],
    *,
    std: float | None = None,
    value=None,
    take: Sequence[int] | None = None,
) -> nnx.Param:
    """A float32 master parameter with one dimension name per dim; normal(0, std) or a constant.

    `take` lists the entries of dim 0 to hold, in this order and perhaps more than once.
    """
    assert len(shape) == len(dims), (shape, dims)
    if value is None:
        if keys.gain is not None and std is not None:
            std *= keys.gain(tuple(dims))
        array = jax.random.normal(keys(), tuple(shape), jnp.float32) * jnp.float32(std)
    else:
        array = jnp.full(tuple(shape), value, jnp.float32)
    if take is not None:
        array = array[jnp.asarray(take, jnp.int32)]
    return nnx.Param(array, dims=tuple(dims))


def price(shape: Sequence[int], dims: Sequence[str]) -> Price:
    """A zero price vector with dimension names."""
    return Price(jnp.zeros(tuple(shape), jnp.float32), dims=tuple(dims))


def numbers(values: Sequence[int], dims: Sequence[str]) -> Price:
    """Whole numbers that are data and not learned, kept beside the prices; int32."""
    return Price(jnp.asarray(values, jnp.int32), dims=tuple(dims))


def read(variable: nnx.Variable, dtype: Any = None) -> jax.Array:
    """The array in a variable, as a layer uses it: a plan may keep it in parts between uses.

    `dtype` is what the layer rounds it to, if it does: a plan then sends it so. What comes is as
    wide as the array.
    """
    if isinstance(variable, nnx.Param):
        return ops.gathered(variable[...], variable.get_metadata()["dims"], dtype)
    return variable[...]


def stored(variable: nnx.Variable) -> jax.Array:
    """The array in a variable as it is kept, for code that can use it in parts."""
    return variable[...]


def _fill(template: nnx.State, values: dict) -> nnx.State:
    state = jax.tree.map(lambda x: x, template)
    nnx.replace_by_pure_dict(state, values)
    return state


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, to be a static argument
class Definition:
    """A model without arrays: what to build, and names and shapes of all it holds."""

    build: Callable[[Keys], Module]
    graphdef: Any
    param_state: Any
    price_state: Any

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """Fresh (params, prices) as nested dicts of float32 arrays."""
        _, params, prices = nnx.split(self.build(Keys(key)), nnx.Param, Price)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(prices)

    def merge(self, params: dict, prices: dict) -> Any:
        """The callable module that holds these arrays."""
        return nnx.merge(
            self.graphdef, _fill(self.param_state, params), _fill(self.price_state, prices)
        )

    @property
    def shapes(self) -> dict:
        """Nested dict of jax.ShapeDtypeStruct, one per parameter."""
        return nnx.to_pure_dict(self.param_state)

    @property
    def price_shapes(self) -> dict:
        """Nested dict of jax.ShapeDtypeStruct, one per price vector."""
        return nnx.to_pure_dict(self.price_state)

    @property
    def dims(self) -> dict:
        """Nested dict, shaped like the parameters, of tuples of dimension names."""
        return _dims(self.param_state)

    @property
    def price_dims(self) -> dict:
        """Nested dict, shaped like the prices, of tuples of dimension names."""
        return _dims(self.price_state)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _dims(state: nnx.State) -> dict:
    def walk(node):
        if _is_variable(node):
            return tuple(node.get_metadata()["dims"])
        return {k: walk(v) for k, v in node.items()}

    return walk(state)


def define(build: Callable[[Keys], Module]) -> Definition:
    """The Definition of what `build` makes, without allocating any array."""
    abstract = nnx.eval_shape(lambda: build(Keys(jax.random.key(0))))
    graphdef, params, prices = nnx.split(abstract, nnx.Param, Price)
    return Definition(build, graphdef, params, prices)


def stack(build: Callable[[Keys], Module], repeats: int, keys: Keys) -> Module:
    """`repeats` independently initialised copies as one module whose arrays lead with dim N."""
    def made(own: Keys) -> Module:
        own.gain = keys.gain
        return build(own)

    definition = define(made)
    params, prices = jax.vmap(definition.init)(jax.random.split(keys(), repeats))

    def lead(variable):
        # the shapes below come from `params`; only the names are taken from here
        names = ("N", *variable.get_metadata()["dims"])
        return variable.replace(dims=names)

    p, q = (
        jax.tree.map(lead, s, is_leaf=_is_variable)
        for s in (definition.param_state, definition.price_state)
    )
    return nnx.merge(definition.graphdef, _fill(p, params), _fill(q, prices))


class Layers(NamedTuple):
    """A stack's layers: `run(carry, (params, fixed) of one layer, extra) -> (carry, out)`.

    Shapes: the leaves of `params`, which are trained, and of `fixed` lead with N.
    """

    run: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Any
    fixed: Any


def layers(
    stacks: Sequence[Module],
    call: Callable[..., tuple[Any, Any]],
    wrap: Callable[[Callable], Callable] = lambda f: f,
) -> Layers:
    """The Layers of `call(modules_of_layer_n, carry, n) -> (carry, out)` over stacked modules.

    With `extra`, the call is `call(modules, carry, n, extra)`. `wrap` is applied to the body of one
    repeat (rematerialisation).
    """
    parts = [nnx.split(m, nnx.Param, Price) for m in stacks]
    params = [nnx.to_pure_dict(p) for _, p, _ in parts]
    prices = [nnx.to_pure_dict(q) for _, _, q in parts]
    repeats = jax.tree.leaves(params)[0].shape[0]

    def run(carry, xs, extra):
        own, (more, n) = xs
        modules = [
            nnx.merge(g, _fill(p, pa), _fill(q, qa))
            for (g, p, q), pa, qa in zip(parts, own, more, strict=True)
        ]
        return call(modules, carry, n) if extra is None else call(modules, carry, n, extra)

    return Layers(wrap(run), params, (prices, jnp.arange(repeats)))


def part(stack: Layers, first: int, last: int) -> Layers:
    """Layers `first` to `last`, exclusive; all of them are the stack as it is."""
    if first == 0 and last == jax.tree.leaves(stack.params)[0].shape[0]:
        return stack
    own = (stack.params, stack.fixed)
    return Layers(stack.run, *jax.tree.map(lambda a: a[first:last], own))


def scan_layers(
    stack: Layers, carry: Any, *, scan: bool, extra: Any = None, rows: Any = None
) -> tuple[Any, Any]:
    """Runs the layers one after the other over the stacked dim N.

    A layer is given its part of `extra`, arrays that also lead with N, or all of `rows`, arrays of
    a batch's rows. A plan may send rows through in parts, with sums over the parts in what a layer
    adds and tells. With `scan=False` the loop is unrolled, which compiles longer and runs the same.
    """
    run, arrays = stack.run, (stack.params, stack.fixed)
    repeats = jax.tree.leaves(arrays)[0].shape[0]

    def body(carry, xs, rows=rows):
        layer, more = xs
        return run(carry, layer, rows if rows is not None else more)

    placed = apply.current()
    if placed is not None and placed.piped and rows is not None:
        return pipeline.through(placed, body, (arrays, None), carry, rows)
    if scan and repeats > 1:
        return jax.lax.scan(body, carry, (arrays, extra))
    outs = []
    # split and not indexed: its gradient is one concatenation, not a sum of padded arrays
    leaves, tree = jax.tree.flatten((arrays, extra))
    columns = [jax.lax.split(a, (1,) * repeats) for a in leaves]
    for n in range(repeats):
        row = [jax.lax.squeeze(column[n], (0,)) for column in columns]
        carry, out = body(carry, jax.tree.unflatten(tree, row))
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)
