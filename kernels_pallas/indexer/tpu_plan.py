"""What the TPU kernels of the indexer can do, and how they cut a call.

A step multiplies some keys, which are the rows of its products, with the queries of a tile, head
after head: a head's weights are then a row of numbers, and are spread over rows for nothing. By
arithmetic for heads of 128 on a v5p a number takes 128 multiply-adds, of which its matrix units do
65,536 a cycle, and three operations of 4,096 a cycle: so products set the pace.

Scores go to memory, a part of the queries at a time, and XLA takes the best of them: a TPU's vector
unit neither sorts nor scatters.
"""

from __future__ import annotations

import dataclasses

from kernels_pallas import blocks, device
from kernels_pallas.token_sparse import tpu_plan
from kernels_pallas.tpu import LANES, VMEM, whole

SCORES = 1 << 26  # held at once: 256 MB
_QUERIES = (256, 128)  # of a tile
_KEYS = (1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys of a step."""

    t: int
    n: int


def _bytes(J: int, D: int, itemsize: int, tiles: Tiles) -> int:
    """Fast memory of the scores: operands and results twice, the sum, and two stages of it."""
    rows = whole(J, 8)
    queries = tiles.t * (J * whole(D, LANES) * itemsize + rows * 4 + LANES * 4)
    keys = tiles.n * (whole(D, LANES) * itemsize + 2 * 8 * 4)
    return 2 * (queries + keys) + 5 * tiles.t * tiles.n * 4


def options(J: int, D: int, itemsize: int) -> list[Tiles]:
    """Return the tiles that fit in fast memory."""
    every = [Tiles(t, n) for t in _QUERIES for n in _KEYS]
    return [tiles for tiles in every if _bytes(J, D, itemsize, tiles) <= VMEM]


def choose(C: int, S: int, J: int, D: int, itemsize: int) -> Tiles:
    """Return the tiles for scores of C queries and S keys: tuned ones, or those of least work."""
    every = options(J, D, itemsize)

    def cost(tiles):  # what is multiplied, and an estimate of what a step costs beside
        return whole(C, tiles.t) * whole(S, tiles.n) * (1 + LANES / tiles.t) * (1 + LANES / tiles.n)

    workload = {"queries": C, "keys": S, "J": J, "D": D, "itemsize": itemsize}
    best = dataclasses.asdict(min(every, key=cost))
    return Tiles(**blocks.choose("index_select", "mosaic_tpu", workload, best,
                                 [dataclasses.asdict(tiles) for tiles in every]))


@dataclasses.dataclass(frozen=True)
class MassTiles(Tiles):
    """Queries and keys of a step, and heads of attention that it adds up."""

    heads: int


def _mass_options(H: int, K: int, D: int, itemsize: int) -> list[MassTiles]:
    """Tiles that fit: heads of one key head, or all heads of some."""
    def fits(t, n, heads):
        keys = max(heads * K // H, 1)
        arrays = (heads * t + keys * n) * whole(D, LANES) * itemsize
        arrays += whole(heads, 8) * t * 4 + t * n * 4
        return 2 * arrays + 5 * t * n * 4 <= VMEM

    shares = [p for p in range(1, H + 1) if H % p == 0 and (p % (H // K) == 0 or H // K % p == 0)]
    return [MassTiles(t, n, p) for t in _QUERIES for n in _KEYS for p in shares if fits(t, n, p)]


def _slopes_options(kernel: str, J: int, D: int, itemsize: int) -> list[Tiles]:
    """Tiles that fit of "query_slopes", with a result for every head, or "key_slopes"."""
    width = whole(D, LANES)

    def fits(t, n):
        by_query = J * t * width * (itemsize + 4 if kernel == "query_slopes" else 2 * itemsize)
        by_key = n * width * (itemsize if kernel == "query_slopes" else itemsize + 4)
        return 2 * (by_query + by_key + t * n * 4) + 4 * t * n * 4 <= VMEM

    return [Tiles(t, n) for t in _QUERIES for n in _KEYS if fits(t, n)]


def _least(every, C: int, S: int, workload: dict[str, int | str]):
    """Return the tuned tiles of index_kl_dense, or those of least work."""
    def cost(tiles):  # as above, and a step with few heads waits for its queries
        work = whole(C, tiles.t) * whole(S, tiles.n) * (1 + LANES / tiles.t) * (1 + LANES / tiles.n)
        return work * (1 + 1 / getattr(tiles, "heads", 1))

    found = blocks.choose("index_kl_dense", "mosaic_tpu", workload | {"queries": C, "keys": S},
                          dataclasses.asdict(min(every, key=cost)),
                          [dataclasses.asdict(tiles) for tiles in every])
    return type(every[0])(**found)


def choose_mass(C: int, S: int, H: int, K: int, D: int, itemsize: int) -> MassTiles:
    """Return the tiles of attention's mass of H heads and K key heads."""
    return _least(_mass_options(H, K, D, itemsize), C, S,
                  {"kernel": "mass", "H": H, "K": K, "D": D, "itemsize": itemsize})


def choose_slopes(kernel: str, C: int, S: int, J: int, D: int, itemsize: int) -> Tiles:
    """Return the tiles of one of the gradient's kernels."""
    return _least(_slopes_options(kernel, J, D, itemsize), C, S,
                  {"kernel": kernel, "J": J, "D": D, "itemsize": itemsize})


def supports_dense(q, k, w, main_q, main_k, main_lse, **keywords) -> str | None:
    """Return None, or why the TPU kernels cannot run index_kl_dense."""
    del main_lse
    if reason := device.lacks_tpu(main_q=main_q) or supports_select(q, k, w, **keywords):
        return reason
    (J, D), (H, Dk), K = q.shape[2:], main_q.shape[2:], main_k.shape[2]
    if 0 in (H, Dk):
        return f"needs heads and a width of attention, main_q is {main_q.shape}"
    for kernel in ("query_slopes", "key_slopes"):
        if not _slopes_options(kernel, J, D, q.dtype.itemsize):
            return f"needs tiles of all heads within {VMEM} bytes of fast memory, {J} of {D} do not"
    if not _mass_options(H, K, Dk, main_q.dtype.itemsize):
        return f"needs a tile of a head within {VMEM} bytes of fast memory, {Dk} wide is not"
    return None


def supports_select(q, k, w, **keywords) -> str | None:
    """Return None, or why the TPU kernel cannot score this call."""
    del k, w, keywords
    J, D = q.shape[2:]
    if reason := device.lacks_tpu(q=q):
        return reason
    if not options(J, D, q.dtype.itemsize):
        least = _bytes(J, D, q.dtype.itemsize, Tiles(_QUERIES[-1], _KEYS[-1]))
        return f"needs at most {VMEM} bytes of fast memory, {J} heads of {D} take {least}"
    return None


def supports_listed(q, k, w, chosen, mass, *, scale=1.0) -> str | None:
    """Return None, or why the TPU kernels cannot run index_kl_listed."""
    del w, mass
    plan = tpu_plan.plan_of("index_kl_listed", q, k, chosen, v_dim=1, scale=scale)
    return tpu_plan.lacks(q, plan, ("numbers", "slopes"))
