"""Parameters as layers use them: gathered from where a plan stores them, gradients sent back.

What a product rounds to bfloat16 anyway is rounded where it lies and travels as bfloat16, half the
bytes. Gradients come from the products in float32 and are added up over devices in float32: they
would lose digits with every device that adds to them, and travel once where weights travel twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import NamedSharding

from kernels_pallas import device
from sparse_pretrain.sharding import apply


def gathered(w, dims: tuple[str, ...], dtype=None):
    """A parameter as a layer uses it, in its own dtype; what it is rounded to is `dtype`, if given.

    Rounded it is only where it is gathered: on one device the reader rounds it.
    """
    placed = apply.current()
    if placed is None:
        return w
    dims = dims[len(dims) - w.ndim :]  # of one layer of a stack
    stored, used = (placed.parameter(dims, w.shape, use) for use in ("stored", "used"))
    if stored == used:
        return w
    sent = w.dtype if dtype is None else jnp.dtype(dtype)
    if jnp.finfo(sent).bits >= jnp.finfo(w.dtype).bits:
        sent = w.dtype
    where = jax.sharding.get_abstract_mesh()
    laid = {"stored": NamedSharding(where, stored), "used": NamedSharding(where, used)}
    return _gather_p.bind(w, **laid, sent=sent)


def kept_apart(layer: Callable) -> Callable:
    """The layer, its backward pass gathering parameters again in place of keeping them gathered."""
    placed = apply.current()
    if placed is None or not placed.plan.stored:
        return layer
    return jax.checkpoint(layer, policy=lambda primitive, *_, **__: primitive is not _gather_p)


# A primitive, so that a policy can tell it from activations that are laid out. A name would not do:
# `save_anything_except_these_names` keeps the array that is named instead.
_gather_p = Primitive("gather_parameter")


def _gather(w, *, stored, used, sent):
    """Rounded where it is stored, gathered, as wide as before: the reader's rounding is exact."""
    hold = jax.lax.with_sharding_constraint
    small = hold(w.astype(sent), stored)
    if sent == jnp.bfloat16 and device.platform() == "cpu":
        # XLA:CPU widens what it sends in bfloat16, but not its bits
        bits = jax.lax.bitcast_convert_type(small, jnp.uint16)
        whole = jax.lax.bitcast_convert_type(hold(hold(bits, stored), used), sent)
    else:
        whole = hold(small, used)
    return whole.astype(w.dtype)


def _scatter(dw, w, *, stored, **_):
    """The gradient of what was gathered: summed over devices, each its part, as wide as it is."""
    del w
    return [jax.lax.with_sharding_constraint(dw, stored)]


_gather_p.def_impl(_gather)
_gather_p.def_abstract_eval(lambda w, **_: w)
mlir.register_lowering(_gather_p, mlir.lower_fun(_gather, multiple_results=False))
ad.deflinear2(_gather_p, _scatter)  # rounding has the gradient of what it rounds, as in astype
