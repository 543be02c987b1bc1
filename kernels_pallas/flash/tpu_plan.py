"""What the TPU kernels of flash can do, and how they cut a call.

A visit is a tile of queries that meets a step of keys, or in the keys' gradients a tile of keys
that meets a step of queries. Visits are listed, so that the grid has one step for each and none for
what documents, a window or the order of rows keep apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels_pallas import blocks, device
from kernels_pallas.flash import pairs, visits
from kernels_pallas.flash.table import Table
from kernels_pallas.tpu import LANES, VMEM, whole

_SIZES = (1024, 512, 256, 128)  # of queries, and of keys
# Stages of a visit's scores that are alive at once: scores, weights, their gradients, and narrow
# copies for the products; float32 operands are multiplied in parts.
_STAGES = 6
# Multiply-adds of a v5p's matrix units in a cycle; a visit's cost by estimate, 0.35 us.
_PER_CYCLE, _VISIT = 65_536, 600
# Of a list, which lies in scalar memory: three numbers each.
VISITS = 1 << 15
COLUMNS = 8  # rows of memory that the numbers of keys take, of which two are used


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing. `position` is pairs.py's plan, in blocks of a tile each."""

    position: pairs.Plan
    B: int
    H: int
    K: int
    Dk: int
    Dv: int
    segmented: bool
    marked: bool  # whether a visit may be masked that no position masks
    placed: bool  # whether query 0 stands where data says
    late: bool  # whether keys end where data says

    together = 1  # a tile of keys is a step of keys

    @property
    def L(self) -> int:
        """Queries in memory."""
        return whole(self.position.L, self.position.block_q)

    @property
    def S(self) -> int:
        """Keys in memory."""
        return whole(self.position.S, self.position.block_k)

    @property
    def tiles(self) -> int:
        """Tiles of queries."""
        return self.L // self.position.block_q

    @property
    def steps(self) -> int:
        """Steps of keys."""
        return self.S // self.position.block_k

    @property
    def D(self) -> int:
        """Width of keys in memory."""
        return whole(self.Dk, LANES)

    @property
    def V(self) -> int:
        """Width of values in memory."""
        return whole(self.Dv, LANES)

    @property
    def G(self) -> int:
        """Query heads of a key head."""
        return self.H // self.K

    def cut(self, block_q: int, block_k: int) -> Plan:
        """Return it in other blocks."""
        position = self.position._replace(block_q=block_q, block_k=block_k)
        return dataclasses.replace(self, position=position)

    @property
    def visits(self) -> int:
        """The most that either list has, of any documents: a tile that sees nothing has one."""
        return self.B * (self.met + max(self.tiles, self.steps))

    @property
    def met(self) -> int:
        """The most pairs of a tile and a step that meet in a row of the batch."""
        at = self.position
        if self.late:  # keys of a window may lie anywhere
            at = at._replace(window=None)
        if not self.placed:
            spans = (visits.ranges(at, i, marked=True)[0] for i in range(self.tiles))
            return sum(stop - first for first, stop, _ in spans)
        if at.window is None:
            return self.tiles * self.steps
        reach = (at.block_q + at.window) // (at.stride * at.block_k) + 2
        return self.tiles * min(reach, self.steps)


def _bytes(t: int, n: int, Dk: int, Dv: int, itemsize: int) -> int:
    """Fast memory of the largest of the kernels: operands and results twice, sums and stages."""
    widths = whole(Dk, LANES) + whole(Dv, LANES)
    operands = 2 * (t + n) * widths * itemsize
    results = max(t, n) * widths * (2 * itemsize + 4)
    numbers = 2 * COLUMNS * 4 * (2 * t + n) + n * LANES * 4
    return operands + results + numbers + _STAGES * t * n * 4


def options(plan: Plan, itemsize: int) -> list[Plan]:
    """Return the plan in all blocks that fit in fast memory and whose visits can be listed."""
    def fits(t, n):
        return (_bytes(t, n, plan.Dk, plan.Dv, itemsize) <= VMEM
                and t <= whole(plan.position.L, LANES) and n <= whole(plan.position.S, LANES))

    every = (plan.cut(t, n) for t in _SIZES for n in _SIZES if fits(t, n))
    return [x for x in every if x.visits <= VISITS]


def _cost(plan: Plan) -> float:
    """Cycles of a v5p for a head, by arithmetic: products, and what a visit costs beside."""
    t, n = plan.position.block_q, plan.position.block_k
    products = t * n * (plan.D + plan.V) / _PER_CYCLE
    return plan.met * (products * (1 + LANES / t) * (1 + LANES / n) + _VISIT)


def plan_of(q, k, v, *, segments_q=None, scale, causal=True, window=None, softcap=None,
            ends_BxS=None, stride=1, span=1, block_q=None, block_k=None, first=None,
            **nothing) -> Plan | None:
    """Return the plan of a call of the op, or None where no blocks fit.

    Blocks that are asked for are rounded up to whole lanes.
    """
    del nothing
    (B, L, H, Dk), (S, K), Dv = q.shape, k.shape[1:3], v.shape[-1]
    late, itemsize = ends_BxS is not None, q.dtype.itemsize
    strided = late or (stride, span) != (1, 1)
    offset = 0 if strided or first is not None else S - L
    position = pairs.Plan(float(scale), causal, window, softcap, LANES, LANES, L, S, stride, span,
                          offset)
    plan = Plan(position, B, H, K, Dk, Dv, segments_q is not None,
                late or segments_q is not None, first is not None, late)
    every = options(plan, itemsize)
    if not every:
        return None

    def blocks_of(plan):
        return {"block_q": plan.position.block_q, "block_k": plan.position.block_k}

    workload = {"L": L, "S": S, "Dk": Dk, "Dv": Dv, "itemsize": itemsize, "causal": causal,
                "window": window, "stride": stride}
    asked = {name: x if x is None else whole(x, LANES)
             for name, x in (("block_q", block_q), ("block_k", block_k))}
    found = blocks.choose("flash", "mosaic_tpu", workload, blocks_of(min(every, key=_cost)),
                          [blocks_of(x) for x in every], **asked)
    return plan.cut(**found)


def supports(q, k, v, **keywords) -> str | None:
    """Return None, or why the TPU kernels cannot run this call."""
    if lacks := device.lacks_tpu(q=q):
        return lacks
    if 0 in (*q.shape, *v.shape):
        return f"needs queries, keys and widths, q is {q.shape} and v {v.shape}"
    Dk, Dv, itemsize = q.shape[-1], v.shape[-1], q.dtype.itemsize
    least = _bytes(LANES, LANES, Dk, Dv, itemsize)
    if least > VMEM:
        return f"needs at most {VMEM} bytes of fast memory, widths {Dk} and {Dv} take {least}"
    plan = plan_of(q, k, v, **keywords)
    if plan is None:
        return (f"needs at most {VISITS} meetings of tiles, {q.shape[0]} rows of {q.shape[1]} "
                f"queries and {k.shape[1]} keys have more")
    if (n := plan.visits) > VISITS:
        return (f"needs at most {VISITS} meetings of tiles, blocks of {plan.position.block_q} "
                f"queries and {plan.position.block_k} keys have {n}")
    if (n := _bytes(plan.position.block_q, plan.position.block_k, Dk, Dv, itemsize)) > VMEM:
        return (f"needs at most {VMEM} bytes of fast memory, blocks of {plan.position.block_q} "
                f"queries and {plan.position.block_k} keys take {n}")
    return None


class Visits(NamedTuple):
    """A list of visits, of which `used` are made.

    Shapes: mine int32 [visits + 1], the number of the tile in the batch, -1 after the last;
    other, of the step in the batch; plain, 1 where no mask touches.
    """

    mine: Any
    other: Any
    plain: Any
    used: Any


def listed(plan: Plan, table: Table, by_key: bool) -> Visits:
    """Return the visits of tiles of queries, or of keys, in order."""
    i32 = jnp.int32
    edges = table.queries if by_key else table.keys
    first, last = edges[..., 0], edges[..., -1]
    (B, N), M = first.shape, plan.tiles if by_key else plan.steps
    counts = jnp.maximum(last - first, 1).reshape(-1)
    stops = jnp.cumsum(counts, dtype=i32)
    place = jnp.arange(plan.visits + 1, dtype=i32)
    mine = jnp.repeat(jnp.arange(B * N, dtype=i32), counts, total_repeat_length=place.size)
    step = jnp.minimum(first.reshape(-1)[mine] + place - (stops - counts)[mine], M - 1)
    row = mine // N
    other = row * M + step
    query, key = (other, mine % N) if by_key else (mine, step)
    inside = table.keys.reshape(B * plan.tiles, 4)[query]
    plain = (inside[:, 1] <= key) & (key < inside[:, 2])
    used = stops[-1]
    return Visits(jnp.where(place < used, mine, -1), other, plain.astype(i32), used)
