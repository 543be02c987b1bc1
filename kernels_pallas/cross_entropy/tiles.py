"""Tiles of tokens and vocabulary of the TPU kernels of cross-entropy, and what they cannot do."""

from __future__ import annotations

from typing import NamedTuple

from kernels_pallas import blocks, device
from kernels_pallas.tpu import LANES, VMEM

ROWS = 16  # of a tile of tokens: bfloat16 is stored in pairs of 8
_TOKENS = (1024, 512, 256, 128)
_COLUMNS = (2048, 1024, 512, 256, 128)


class Tiles(NamedTuple):
    """Tokens and vocabulary entries of a tile."""

    m: int
    n: int


def supports(x, head, targets, weights, **keywords) -> str | None:
    """Return None, or why the TPU kernels cannot run this call."""
    del targets, weights, keywords
    T, D = x.shape
    if lacks := device.lacks_tpu(x=x):
        return lacks
    V = head.size // D if D else 0
    if 0 in (T, D, V):
        return f"needs tokens, a width and a vocabulary, there are {T}, {D} and {V}"
    for product in ("forward", "dx", "dhead"):
        if not _options(product, T, D, V, x.dtype.itemsize):
            return f"needs a width of which tiles fit in fast memory, D is {D}"
    return None


def _bytes(product: str, tiles: Tiles, D: int, itemsize: int) -> int:
    """Fast memory of one kernel: operands and results twice, sums, and the logits' stages."""
    m, n, D = (-(-t // LANES) * LANES for t in (*tiles, D))
    operands = 2 * itemsize * (m * D + D * n) + 16 * m * n
    result = {"forward": 0, "dx": (4 + 2 * itemsize) * m * D, "dhead": 12 * D * n}[product]
    return operands + result


def _options(product: str, T: int, D: int, V: int, itemsize: int) -> list[Tiles]:
    rows = -(-T // ROWS) * ROWS
    found = {Tiles(min(m, rows), min(n, V)) for m in _TOKENS for n in _COLUMNS}
    return sorted(t for t in found if _bytes(product, t, D, itemsize) <= VMEM)


def choose(product: str, T: int, D: int, V: int, itemsize: int) -> Tiles:
    """Return the tiles of a kernel, forward, dx or dhead: tuned ones, or those of least traffic."""
    every = _options(product, T, D, V, itemsize)

    def cost(tiles):
        work = -(-T // tiles.m) * tiles.m * -(-V // tiles.n) * tiles.n
        return work * (1 + LANES / tiles.m) * (1 + LANES / tiles.n)

    workload = {"kernel": product, "T": T, "D": D, "V": V, "itemsize": itemsize}
    found = blocks.choose("cross_entropy", "mosaic_tpu", workload, min(every, key=cost)._asdict(),
                          [t._asdict() for t in every])
    return Tiles(**found)
