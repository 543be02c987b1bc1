"""A function of each device's part of arrays, by the logical dims of a plan."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sparse_pretrain.sharding import apply


def each_device(
    function: Callable, args: Sequence[Any], dims: Sequence[Any], out: Any, *, heads=()
) -> Any:
    """`function` of each device's part of the arguments; as it is without a plan.

    Shapes: a letter of `dims` per dim of an argument, '.' for one that every device has whole; for
    an argument of several arrays, a tuple of such; `out` such letters, or several. Of the letters
    in `heads` either all are cut or none, but those of size 1, which stay whole. The function is
    called with `axes`, letter -> axes that cut it.
    """
    placed = apply.current()
    if placed is None:
        return function(*args, axes={})
    arrays = [leaf for arg in args for leaf in jax.tree.leaves(arg)]
    letters = []
    for arg, named in zip(args, dims, strict=True):
        if arg is not None:
            letters += [named] if isinstance(named, str) else list(named)
    found: dict[str, tuple[str, ...]] = {}
    for array, named in zip(arrays, letters, strict=True):
        assert array.ndim == len(named), (array.shape, named)
        for letter, size in zip(named, array.shape, strict=True):
            if letter == "." or (letter in heads and size == 1):
                continue
            axes = placed.cut("H" if letter in heads else letter, size)
            found[letter] = min(found.get(letter, axes), axes, key=len)
    if any(not found.get(letter, True) for letter in heads):
        found |= dict.fromkeys(heads, ())

    def spec(named, shape=None):
        sizes = shape or (0,) * len(named)
        cut = [
            () if c in heads and size == 1 else found.get(c, ())
            for c, size in zip(named, sizes, strict=True)
        ]
        return PartitionSpec(*map(apply.entry, cut))

    specs = iter([spec(named, a.shape) for a, named in zip(arrays, letters, strict=True)])

    def body(*parts):
        with apply.one_device():
            return function(*parts, axes=found)

    return jax.shard_map(
        body,
        in_specs=jax.tree.map(lambda _: next(specs), tuple(args)),
        out_specs=spec(out) if isinstance(out, str) else tuple(map(spec, out)),
        axis_names=set(placed.mesh.axis_names) - placed.manual,
        check_vma=False,  # the kernels' loops start from arrays that all devices share
    )(*args)


def first_row(axes, queries: int, start: int = 0):
    """The row at which this device's first query stands, None for the ops' own default."""
    if not axes.get("L"):
        return None
    (axis,) = axes["L"]
    return start + jax.lax.axis_index(axis) * queries
