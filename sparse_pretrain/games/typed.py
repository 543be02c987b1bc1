"""Weights that someone typed."""

from sparse_pretrain import spec

TOLERANCE = 1e-3  # of their sum


def named(text: str) -> dict[str, float]:
    """Domain -> weight of DOMAIN=WEIGHT,DOMAIN=WEIGHT..

    Errors: ValueError of one line naming `weights` and what is wrong with it.
    """
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.rpartition("=")
        name = name.strip()
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        ok = bool(name) and 0 <= weight <= 1
        spec.require(ok, f"weights: {part!r} is not DOMAIN=WEIGHT with a weight in [0, 1]")
        spec.require(name not in found, f"weights: {name!r} is named twice")
        found[name] = weight
    total = sum(found.values())
    ok = not found or abs(total - 1) <= TOLERANCE
    spec.require(ok, f"weights: must sum to 1, {text!r} sums to {total:.6g}")
    return found
