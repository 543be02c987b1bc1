"""Tokens to copies of experts, batch by batch: who computes what when experts have replicas.

A placement says which device holds which expert; it is made from loads of the past. A schedule is
made from the loads of the batch itself. Host code: numpy, and scipy where a program is solved.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# What a source gives: pairs per expert, or per rank that the tokens come from and expert.
Load = Int[np.ndarray, " experts"] | Int[np.ndarray, "ranks experts"]


class Schedule(NamedTuple):
    """Shapes, for E experts and D devices: tokens [E, D] pairs that each device computes for each
    expert; fetched [E, D] where the batch needs a weight copy that the placement does not hold.
    Units: `overflow` pairs above the rows a device was given; 0 where there is no such budget.
    """

    tokens: Int[np.ndarray, "E D"]
    fetched: Bool[np.ndarray, "E D"]
    overflow: int = 0

    @property
    def load(self) -> Int[np.ndarray, " D"]:
        """Pairs that each device computes."""
        return self.tokens.sum(0)

    @property
    def copies(self) -> int:
        """Weights moved for this batch, in experts."""
        return int(self.fetched.sum())

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest device over the mean; 1 where nothing is to do."""
        return max_over_mean(self.load)


def max_over_mean(load_D: np.ndarray) -> float:
    """Load of the busiest device over the mean; 1 where nothing is to do."""
    mean = load_D.mean()
    return float(load_D.max() / mean) if mean else 1.0


def held(phy2log_R: Int[np.ndarray, " R"], experts: int, devices: int) -> Int[np.ndarray, "E D"]:
    """Copies of each expert on each device, from the expert of every slot, device by device.

    Errors: ValueError when slots do not divide by devices, or an expert has no slot.
    """
    slots = len(phy2log_R)
    if devices < 1 or slots % devices:
        raise ValueError(f"devices: {slots} slots do not divide by {devices}")
    holds = np.zeros((experts, devices), np.int64)
    np.add.at(holds, (phy2log_R, np.arange(slots) // (slots // devices)), 1)
    _check(holds)
    return holds


def _check(holds_ExD):
    missing = np.flatnonzero(holds_ExD.sum(1) == 0)
    if missing.size:
        raise ValueError(f"placement: expert {missing[0]} is on no device")


def total(load: np.ndarray, experts: int) -> np.ndarray:
    """Pairs of each expert, over all ranks they come from.

    Errors: ValueError for another number of experts, or negative loads.
    """
    load_E = load.sum(0) if load.ndim == 2 else load
    if len(load_E) != experts:
        raise ValueError(f"load: {len(load_E)} experts, but the placement has {experts}")
    if (load_E < 0).any():
        raise ValueError(f"load: must not be negative, got {load_E.min()}")
    return load_E.astype(np.int64)


def made(tokens_ExD: np.ndarray, holds_ExD: np.ndarray, overflow: int = 0) -> Schedule:
    """The schedule of a plan on a placement: fetched is what the placement does not hold."""
    return Schedule(tokens_ExD, (tokens_ExD > 0) & (holds_ExD == 0), overflow)


def even(load: Load, holds: Int[np.ndarray, "E D"]) -> Schedule:
    """The tokens of an expert in equal parts over its copies, whole ones; EPLB's own rule.

    Differs: what does not divide goes to the first copies, counted from the expert's number on.
    """
    load_E = total(load, len(holds))
    _check(holds)
    count_E = holds.sum(1)
    part, rest = load_E // count_E, load_E % count_E
    first = np.arange(len(holds)) % count_E  # the copy that the rest starts at

    wrapped = np.maximum(first + rest - count_E, 0)[:, None]
    straight = rest[:, None] - wrapped

    def before(copies_ExD):  # tokens of an expert's first so many copies
        extra = np.minimum(copies_ExD, wrapped) + np.clip(copies_ExD - first[:, None], 0, straight)
        return copies_ExD * part[:, None] + extra

    upto = holds.cumsum(1)
    return made(before(upto) - before(upto - holds), holds)


def linear_program(load: Load, holds: Int[np.ndarray, "E D"]) -> Schedule:
    """The least possible load of the busiest device, tokens split over the copies there are.

    Solves the program in fractions, then rounds by a maximal flow at the next whole capacity: the
    busiest device has at most the program's optimum rounded up, which no whole schedule beats.
    Source: LPLB (deepseek-ai/LPLB); MicroMoE (2511.16947).
    Differs: any copies may share an expert, where LPLB's lie on a fixed graph of devices.
    """
    from scipy import sparse
    from scipy.sparse import csgraph

    load_E = total(load, len(holds))
    best = _optimum(load_E, holds)
    free = _shared(load_E, holds)
    tokens = np.where(holds > 0, load_E[:, None], 0)
    tokens[free] = 0
    fixed = tokens.sum(0)
    if not free.size:
        return made(tokens, holds)
    capacity = math.ceil(best - 1e-6 * max(1.0, best))
    if load_E.sum() >= 2**31:
        raise ValueError(f"load: {load_E.sum()} pairs in a batch, at most {2**31 - 1} fit")
    edge, device = np.nonzero(holds[free])
    rows, columns = len(free), holds.shape[1]
    source, sink = rows + columns, rows + columns + 1
    tail = np.concatenate([np.full(rows, source), edge, rows + np.arange(columns)])
    head = np.concatenate([np.arange(rows), rows + device, np.full(columns, sink)])
    wanted = load_E[free]
    while True:
        room = np.maximum(capacity - fixed, 0)
        limits = np.concatenate([wanted, wanted[edge], room]).astype(np.int32)
        graph = sparse.csr_array((limits, (tail, head)), shape=(sink + 1, sink + 1))
        result = csgraph.maximum_flow(graph, source, sink)
        if result.flow_value == wanted.sum():
            break
        capacity += 1  # the program's tolerance; at most once
    flow = result.flow.tocsr()[edge, rows + device]
    tokens[free[edge], device] = np.asarray(flow).ravel()
    return made(tokens, holds)


def _shared(load_E, holds_ExD):
    """The experts with tokens and a choice: those on more than one device."""
    return np.flatnonzero(((holds_ExD > 0).sum(1) > 1) & (load_E > 0))


def _optimum(load_E, holds_ExD) -> float:
    _check(holds_ExD)
    free = _shared(load_E, holds_ExD)
    alone = np.where(holds_ExD > 0, load_E[:, None], 0)
    alone[free] = 0
    fixed = alone.sum(0).astype(np.float64)
    if not free.size:
        return float(fixed.max())
    from scipy import optimize, sparse

    # in units of the mean load, so that tolerances mean the same at every size
    unit = load_E.sum() / holds_ExD.shape[1]
    edge, device = np.nonzero(holds_ExD[free])
    edges, devices = len(edge), holds_ExD.shape[1]
    each = np.arange(edges)
    on_device = sparse.csr_array((np.ones(edges), (device, each)), shape=(devices, edges + 1))
    busiest = sparse.csr_array(
        (-np.ones(devices), (np.arange(devices), np.full(devices, edges))),
        shape=(devices, edges + 1),
    )
    of_expert = sparse.csr_array((np.ones(edges), (edge, each)), shape=(len(free), edges + 1))
    cost = np.zeros(edges + 1)
    cost[-1] = 1
    found = optimize.linprog(
        cost,
        A_ub=on_device + busiest,
        b_ub=-fixed / unit,
        A_eq=of_expert,
        b_eq=load_E[free] / unit,
        method="highs",
    )
    assert found.status == 0, found.message
    return float(found.fun * unit)


def lp_bound(load: Load, holds: Int[np.ndarray, "E D"]) -> float:
    """The best max over mean that any split over the copies of a placement reaches, in fractions.

    1 where there are no tokens.
    """
    load_E = total(load, len(holds))
    pairs = load_E.sum()
    return _optimum(load_E, holds) * holds.shape[1] / pairs if pairs else 1.0


def slots_bound(load: Load, slots: int, devices: int) -> float:
    """A max over mean below which no placement of so many slots gets, chosen with hindsight.

    The least t with sum over experts of max(1, ceil(load / t)) <= slots, and no less than the
    mean rounded up. It leaves out that every device has the same number of slots, so the best
    placement may be above it.
    Errors: ValueError when there are fewer slots than experts.
    """
    load_E = total(load, load.shape[-1])
    if slots < len(load_E):
        raise ValueError(f"slots: {slots} cannot hold {len(load_E)} experts")
    pairs = int(load_E.sum())
    if not pairs:
        return 1.0
    low = math.ceil(pairs / devices)
    high = max(int(load_E.max()), low)
    while low < high:
        middle = (low + high) // 2
        if np.maximum(-(-load_E // middle), 1).sum() <= slots:
            high = middle
        else:
            low = middle + 1
    return low * devices / pairs


def by_source(
    load: Int[np.ndarray, "S E"], tokens: Int[np.ndarray, "E D"]
) -> Int[np.ndarray, "S E D"]:
    """Whose tokens go to which copy: what a rank can compute itself stays, the rest in order.

    Rank s is device s. Sums over devices and over ranks are the two arguments.
    Errors: ValueError when the two disagree about an expert's tokens.
    """
    if (load.sum(0) != tokens.sum(1)).any():
        expert = int(np.flatnonzero(load.sum(0) != tokens.sum(1))[0])
        have, want = load[:, expert].sum(), tokens[expert].sum()
        raise ValueError(f"load: expert {expert} has {have} tokens, the schedule {want}")
    ranks, devices = len(load), tokens.shape[1]
    out = np.zeros((ranks, *tokens.shape), np.int64)
    both = np.arange(min(ranks, devices))
    out[both, :, both] = np.minimum(load[both], tokens.T[both])
    left_ExS, left_ExD = (load - out.sum(2)).T, tokens - out.sum(0)
    end_s, end_d = left_ExS.cumsum(1), left_ExD.cumsum(1)
    low = np.maximum((end_s - left_ExS)[:, :, None], (end_d - left_ExD)[:, None, :])
    high = np.minimum(end_s[:, :, None], end_d[:, None, :])
    return out + np.maximum(high - low, 0).transpose(1, 0, 2)


def per_slot(
    tokens: Int[np.ndarray, "E D"], phy2log: Int[np.ndarray, " R"]
) -> Int[np.ndarray, " R"]:
    """Tokens of every slot of a placement, from those of every device: copies there share evenly.

    Fetched copies have no slot in a placement and are left out.
    """
    devices = tokens.shape[1]
    device = np.arange(len(phy2log)) // (len(phy2log) // devices)
    seat = phy2log * devices + device
    order = np.argsort(seat, kind="stable")
    sorted_seat = seat[order]
    copy = np.empty(len(seat), np.int64)
    copy[order] = np.arange(len(seat)) - np.searchsorted(sorted_seat, sorted_seat)
    count = np.bincount(seat, minlength=tokens.size)[seat]
    return (tokens[phy2log, device] + count - 1 - copy) // count
