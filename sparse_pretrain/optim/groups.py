"""Which optimizer rule a parameter follows, read from its dimension names alone."""

from collections.abc import Iterator
from typing import Any

from optax.contrib import MuonDimensionNumbers

from sparse_pretrain.shapes import copy_dims as core

# A head dim belongs to the dim after it: D -> (H Dh) in projections, (H Dv) -> D in outputs.
HEADS = ("H", "K", "J")

GROUPS = ("matrix", "router", "embed", "head", "memory", "vector", "unknown")
MEMORY_LR = 5.0  # 2601.07372, section 4.1


def group(dims: tuple[str, ...]) -> str:
    """One of GROUPS for a parameter of these dims.

    `embed` reads the vocabulary (V, D), `head` writes it (D, V), `router` scores experts (D, E),
    `memory` are the rows of a memory's tables (Row, Dm),
    `vector` is every norm scale, bias and tap (W, D) of a short convolution, `matrix` every linear
    map; a parameter whose copies have three or more dims that say nothing of what is reduced is
    `unknown`.
    """
    one = core(dims)
    if len(one) <= 1 or one[0] == "W":
        return "vector"
    if one[0] == "Row":
        return "memory"
    if "V" in one:
        return "embed" if one[0] == "V" else "head"
    if len(one) == 2:
        return "router" if one[1] == "E" else "matrix"
    return "matrix" if len(one) == 3 and _heads(one) is not None else "unknown"


def _heads(one: tuple[str, ...]) -> int | None:
    """Position of the only head dim if another dim follows it, else None."""
    at = [i for i, d in enumerate(one) if d in HEADS]
    return at[0] if len(at) == 1 and at[0] < len(one) - 1 else None


def dimension_numbers(dims: tuple[str, ...], *, per_head: bool) -> MuonDimensionNumbers:
    """The dims that Muon reduces over and the dims it maps to; all others are separate matrices.

    With `per_head` each head's slice is a matrix of its own, else the heads of a projection are
    one: ('D', 'H', 'Dh') gives (0, 2) or (0, (1, 2)), ('H', 'Dv', 'D') gives (1, 2) or ((0, 1), 2).
    Errors: ValueError when the names do not tell.
    """
    one = core(dims)
    skip = len(dims) - len(one)
    if len(one) == 2:
        return MuonDimensionNumbers(skip, skip + 1)
    head = _heads(one) if len(one) == 3 else None
    if head is None:
        raise ValueError(f"dims {dims} name no Muon dimension numbers")
    if per_head:
        rest = [skip + i for i in range(3) if i != head]
        return MuonDimensionNumbers(*rest)
    if head == 0:
        return MuonDimensionNumbers((skip, skip + 1), skip + 2)
    return MuonDimensionNumbers(skip, (skip + 1, skip + 2))


def leaves(dims: Any, path: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted name, dims) of every parameter in a nested dict."""
    if isinstance(dims, tuple):
        yield path, dims
        return
    for key, value in dims.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def map_dims(function: Any, dims: Any) -> Any:
    """The nested dict with `function(dims of the parameter)` at each leaf."""
    if isinstance(dims, tuple):
        return function(dims)
    return {k: map_dims(function, v) for k, v in dims.items()}
