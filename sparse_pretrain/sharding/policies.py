"""Policies by name, and their replay: placed by the loads of one window, scored on the next.

A policy is a rule that places experts, from the past, and one that schedules tokens, from the
batch itself.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sparse_pretrain.sharding import placement, schedule, search, spill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where experts live. Units: `slots` experts over all devices, copies included.

    `groups` of experts are kept on one node each where they divide over `nodes`, as EPLB does.
    """

    experts: int
    devices: int
    slots: int
    nodes: int = 1
    groups: int = 1

    def __post_init__(self):
        for name, part in (("experts", self.experts), ("slots", self.slots)):
            if self.devices < 1 or part % self.devices:
                raise ValueError(f"devices: {part} {name} do not divide by {self.devices} devices")
        if self.slots < self.experts:
            raise ValueError(f"slots: {self.slots} cannot hold {self.experts} experts")
        if self.nodes < 1 or self.devices % self.nodes:
            raise ValueError(f"nodes: {self.devices} devices do not divide by {self.nodes} nodes")

    @property
    def spare(self) -> int:
        """Slots of a device beyond its share of the experts."""
        return (self.slots - self.experts) // self.devices


def slots_for(experts: int, devices: int, redundant: float) -> int:
    """Slots for so many experts and a share of copies, rounded up to divide by devices.

    Errors: ValueError when the share is negative or experts do not divide by devices.
    """
    if devices < 1 or experts % devices:
        raise ValueError(f"devices: {experts} experts do not divide by {devices} devices")
    if not 0 <= redundant < np.inf:
        raise ValueError(f"redundant: must not be negative, got {redundant}")
    # rounding at the twelfth digit: 0.1 x 30 is a hair more than 3
    return experts + devices * int(np.ceil(round(experts * redundant / devices, 12)))


# A placer: (loads seen [W, E], what devices hold now [E, D], setting) -> the expert of each slot.
Placer = Callable[[np.ndarray, np.ndarray, Setting], np.ndarray]


def _never(seen_WxE, holds_ExD, setting):
    return placement.contiguous(setting.experts, setting.experts, setting.devices)


def _ring(seen_WxE, holds_ExD, setting):
    return placement.contiguous(setting.experts, setting.slots, setting.devices)


def _eplb(seen_WxE, holds_ExD, setting):
    weight = seen_WxE.sum(0, keepdims=True)
    placed = placement.rebalance_experts(
        weight, setting.slots, setting.groups, setting.nodes, setting.devices
    )
    return placed.phy2log[0]


def _packed(seen_WxE, holds_ExD, setting):
    return _eplb(seen_WxE, holds_ExD, dataclasses.replace(setting, slots=setting.experts))


def _search(seen_WxE, holds_ExD, setting):
    start = _eplb(seen_WxE, holds_ExD, setting)
    nodes = setting.nodes if setting.groups % setting.nodes == 0 else 1
    found = search.improve(start, search.futures(seen_WxE), setting.devices, nodes=nodes)
    return placement.settle(found, holds_ExD, nodes)


@dataclasses.dataclass(frozen=True)
class Policy:
    """One row of the table.

    `placed` re-places with every window (else the placement is made once, without loads);
    `options` go to the scheduler; `budget` gives it the slots that the placement leaves free.
    """

    what: str
    placer: Placer
    scheduler: Callable[..., schedule.Schedule] = schedule.even
    placed: bool = True
    budget: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TABLE: dict[str, Policy] = {
    "none": Policy("experts in order, no copies, never re-placed", _never, placed=False),
    "eplb": Policy("EPLB: copies and packing from the last window, even parts", _eplb),
    "lp": Policy(
        "copies in a fixed ring, tokens by linear program per batch",
        _ring,
        schedule.linear_program,
        placed=False,
    ),
    "eplb+lp": Policy(
        "EPLB's placement, tokens by linear program per batch", _eplb, schedule.linear_program
    ),
    "search+lp": Policy(
        "EPLB's placement improved by search for loads that may come, tokens by linear program",
        _search,
        schedule.linear_program,
    ),
    "least_loaded": Policy(
        "experts in order; a device above 1.3 times the mean spills tokens and weights",
        _never,
        spill.least_loaded,
        placed=False,
    ),
    "eplb+least_loaded": Policy(
        "EPLB's placement, then spilling above 1.3 times the mean", _eplb, spill.least_loaded
    ),
    "row_budget": Policy(
        "experts in order; equal rows everywhere, as many fetch slots as a device has experts",
        _never,
        spill.row_budget,
        placed=False,
    ),
    "eplb+row_budget": Policy(
        "EPLB's packing without copies; equal rows, its copies' slots are fetch slots",
        _packed,
        spill.row_budget,
        budget=True,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What a policy did. Shapes, for S scored looks, N layers, D devices, M re-placements:
    load [S, N, D] pairs; fetched [S, N] weights moved within a batch, in experts; overflow [S, N]
    pairs; moved and rehomed [M, N], in experts.
    Units: `slots` experts that a device keeps, `prefetch` most that one fetched at once; `seconds`
    of planning on this host, in all.
    """

    load: Int[np.ndarray, "S N D"]
    fetched: Int[np.ndarray, "S N"]
    overflow: Int[np.ndarray, "S N"]
    moved: Int[np.ndarray, "M N"]
    rehomed: Int[np.ndarray, "M N"]
    bound: Float[np.ndarray, "S N"] | None
    slots: int
    prefetch: int
    seconds: float

    @property
    def ratio(self) -> Float[np.ndarray, "S N"]:
        """Load of the busiest device over the mean, by look and layer; 1 without tokens."""
        mean = self.load.mean(-1)
        busiest = self.load.max(-1).astype(np.float64)
        return np.divide(busiest, mean, out=np.ones_like(mean), where=mean > 0)

    @property
    def expert_time(self) -> float:
        """Mean time of the experts, simulated: the busiest device's load over the mean."""
        return float(self.ratio.mean())


def split(steps: int, window: int) -> list[tuple[slice, slice]]:
    """(looks that are seen, looks that are scored) of every re-placement; the last may be short.

    Errors: ValueError when there are fewer than two windows.
    """
    if window < 1:
        raise ValueError(f"window: must be positive, got {window}")
    if steps < 2 * window:
        raise ValueError(
            f"window: {steps} recorded steps are fewer than two windows of {window}, one to place "
            "by and one to score"
        )
    return [
        (slice(at - window, at), slice(at, min(at + window, steps)))
        for at in range(window, steps, window)
    ]


def replay(
    load: Int[np.ndarray, "T N E"],
    policy: Policy,
    setting: Setting,
    window: int,
    *,
    bounds: bool = False,
) -> Replay:
    """Every batch of a trace after the first window, on placements from the window before.

    Weights that no device change needs are not moved. An expert's home, where its optimizer state
    is, stays as long as its device holds the expert. Devices start with experts in order.
    Units: `window` looks. `bounds` solves the linear program of each placement and batch as well.
    """
    layers = load.shape[1]
    parts = split(len(load), window)
    options = dict(policy.options)
    if policy.budget:
        options["slots"] = setting.spare
    holds = [_start(policy, setting)] * layers
    homes = [np.repeat(np.arange(setting.devices), setting.experts // setting.devices)] * layers
    moved, rehomed, made, least = [], [], [], []
    began = time.perf_counter()
    spent = 0.0
    for seen, scored in parts:
        if policy.placed:
            past = load[seen]
            counts = [_place(past[:, n], policy, setting, holds, homes, n) for n in range(layers)]
            moved.append([m for m, _ in counts])
            rehomed.append([h for _, h in counts])
        for step in range(scored.start, scored.stop):
            row = [policy.scheduler(load[step, n], holds[n], **options) for n in range(layers)]
            made.append(row)
            if bounds:
                paused = time.perf_counter()
                least.append([schedule.lp_bound(load[step, n], holds[n]) for n in range(layers)])
                spent += time.perf_counter() - paused
    return Replay(
        load=np.array([[s.load for s in row] for row in made]),
        fetched=np.array([[s.copies for s in row] for row in made]),
        overflow=np.array([[s.overflow for s in row] for row in made]),
        moved=np.array(moved, np.int64).reshape(-1, layers),
        rehomed=np.array(rehomed, np.int64).reshape(-1, layers),
        bound=np.array(least) if bounds else None,
        slots=int(holds[0].sum()) // setting.devices,
        prefetch=max(int(s.fetched.sum(0).max()) for row in made for s in row),
        seconds=time.perf_counter() - began - spent,
    )


def _start(policy, setting):
    """What devices hold before the first loads are seen: a fixed placement, or experts in order."""
    place = _never if policy.placed else policy.placer
    nothing = np.zeros((setting.experts, setting.devices), np.int64)
    slots = place(np.zeros((1, setting.experts)), nothing, setting)
    return schedule.held(slots, setting.experts, setting.devices)


def _place(seen_WxE, policy, setting, holds, homes, layer) -> tuple[int, int]:
    """Re-places one layer in `holds` and `homes`; (weights, homes) moved."""
    placed = policy.placer(seen_WxE, holds[layer], setting)
    new = schedule.held(placed, setting.experts, setting.devices)
    moved = int(((new > 0) & (holds[layer] == 0)).sum())
    stays = new[np.arange(setting.experts), homes[layer]] > 0
    homes[layer] = np.where(stays, homes[layer], (new > 0).argmax(1))
    holds[layer] = new
    return moved, int((~stays).sum())


def replays(
    load: Int[np.ndarray, "T N E"],
    names: Sequence[str],
    setting: Setting,
    window: int,
    *,
    bounds: bool = False,
) -> dict[str, Replay]:
    """The replay of each named policy. Errors: ValueError for an unknown name."""
    for name in names:
        if name not in TABLE:
            raise ValueError(f"policy: unknown {name!r}; known are {', '.join(TABLE)}")
    return {n: replay(load, TABLE[n], setting, window, bounds=bounds) for n in names}


def step_gain(before: Replay, after: Replay, expert_share: float) -> float:
    """How much faster a step is, simulated: experts take the busiest device's time, the rest stays.

    Units: `expert_share` of a step's time under even loads, 0 to 1; 0.1 is 10 % more steps/s.
    Errors: ValueError for another share.
    """
    if not 0 <= expert_share <= 1:
        raise ValueError(f"expert_share: must lie between 0 and 1, got {expert_share}")
    rest = 1 - expert_share
    old, new = (rest + expert_share * r.expert_time for r in (before, after))
    return old / new - 1
