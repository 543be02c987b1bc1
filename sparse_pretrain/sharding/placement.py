"""Experts on devices: how many copies of each, and where, from the loads that were seen.

Logical experts are the model's; physical ones are the slots of devices, each holding a copy of one
logical expert. Host code in numpy: its results enter the step as int arrays, as data.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from sparse_pretrain import spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """Re-placing experts while training: `every` steps, 0 for never, over `devices` on `nodes`.

    `devices` 0 are as many as the plan deals experts over, one without a plan that does. `groups`
    are the router's expert groups, which hierarchical placement keeps on one node.
    """

    every: int = 0
    devices: int = 0
    nodes: int = 1
    groups: int = 1

    def __post_init__(self):
        for field in ("every", "devices"):
            value = getattr(self, field)
            spec.require(value >= 0, f"{field}: must not be negative, got {value}")
        spec.positive(self, "nodes", "groups")

    def over(self, devices: int, plan: str) -> "Config":
        """The same over as many devices as the plan deals experts over.

        Errors: ValueError naming both numbers where another one was asked for.
        """
        if devices > 1 and self.devices not in (0, devices):
            raise ValueError(
                f"placement.devices: {self.devices}, and plan {plan} deals experts over {devices}; "
                f"0 or {devices} fits"
            )
        return dataclasses.replace(self, devices=max(self.devices, devices))

    def check(self, experts: int, slots: int) -> None:
        """Errors: ValueError naming the numbers that do not divide."""
        devices = max(self.devices, self.nodes)
        rebalance_experts(np.ones((1, experts)), slots, self.groups, self.nodes, devices)


class Placement(NamedTuple):
    """Shapes, for N layers, E experts, R slots: phy2log [N, R]; log2phy [N, E, R - E + 1], -1 where
    an expert has fewer copies; logcnt [N, E] copies. Slots lie device by device, R / devices each.
    """

    phy2log: Int[np.ndarray, "N R"]
    log2phy: Int[np.ndarray, "N E most"]
    logcnt: Int[np.ndarray, "N E"]


def balanced_packing(
    weight_NxI: Num[np.ndarray, "N I"], packs: int
) -> tuple[Int[np.ndarray, "N I"], Int[np.ndarray, "N I"]]:
    """(pack of each item, its place in the pack): packs of equal counts and nearly equal weight.

    Heaviest first, each to the lightest pack with room, the lower number among equals. With one
    item a pack the order is left alone.
    Errors: ValueError when the items do not divide into packs.
    Source: EPLB (deepseek-ai/EPLB).
    """
    rows, items = weight_NxI.shape
    if packs < 1 or items % packs:
        raise ValueError(f"packs: {items} items do not divide into {packs} packs")
    room = items // packs
    if room == 1:
        pack = np.broadcast_to(np.arange(items), (rows, items)).copy()
        return pack, np.zeros_like(pack)
    pack = np.zeros((rows, items), np.int64)
    place = np.zeros((rows, items), np.int64)
    order = np.argsort(-weight_NxI.astype(np.float64), axis=1, kind="stable")
    for row in range(rows):
        total, count = np.zeros(packs), np.zeros(packs, np.int64)
        for item in order[row]:
            lightest = int(np.argmin(np.where(count < room, total, np.inf)))
            pack[row, item], place[row, item] = lightest, count[lightest]
            total[lightest] += weight_NxI[row, item]
            count[lightest] += 1
    return pack, place


def replicate(
    weight_NxE: Num[np.ndarray, "N E"], slots: int
) -> tuple[Int[np.ndarray, "N R"], Int[np.ndarray, "N R"], Int[np.ndarray, "N E"]]:
    """(expert of each slot, which copy it is, copies of each expert): least load per copy.

    Every expert has one copy; each further slot goes to the expert with the most load per copy,
    which keeps the largest load per copy as small as that many slots allow.
    Errors: ValueError when there are fewer slots than experts.
    Source: EPLB.
    """
    rows, experts = weight_NxE.shape
    if slots < experts:
        raise ValueError(f"num_replicas: {slots} slots cannot hold {experts} experts")
    expert = np.broadcast_to(np.arange(slots) % experts, (rows, slots)).copy()
    copy = np.zeros((rows, slots), np.int64)
    count = np.ones((rows, experts), np.int64)
    every = np.arange(rows)
    for slot in range(experts, slots):
        busiest = np.argmax(weight_NxE / count, axis=1)
        expert[:, slot], copy[:, slot] = busiest, count[every, busiest]
        count[every, busiest] += 1
    return expert, copy, count


def _inverse(permutation_NxI):
    inverse = np.empty_like(permutation_NxI)
    np.put_along_axis(
        inverse, permutation_NxI, np.arange(permutation_NxI.shape[1])[None, :], axis=1
    )
    return inverse


def rebalance_experts(
    weight: Num[np.ndarray, "N E"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> Placement:
    """Copies of experts and their devices, from a load per layer and expert.

    Where the groups divide over the nodes: groups are packed on nodes, each node copies its own
    experts, and copies are packed on its devices, so that group-limited routing stays within few
    nodes. Elsewhere all experts are one group on one node.
    Units: `weight` tokens, or anything in proportion. Errors: ValueError naming what does not
    divide.
    Source: EPLB, `rebalance_experts`, whose results it equals (ties as with a stable sort).
    """
    weight = np.asarray(weight, np.float64)
    layers, experts = weight.shape
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("weight: loads must be finite and not negative")
    if num_groups < 1 or num_nodes < 1 or num_groups % num_nodes:
        num_groups = num_nodes = 1
    for name, whole, part in (
        ("num_groups", experts, num_groups),
        ("num_gpus", num_replicas, num_gpus),
        ("num_nodes", num_gpus, num_nodes),
    ):
        if part < 1 or whole % part:
            raise ValueError(f"{name}: {whole} does not divide by {part}")
    size = experts // num_groups
    group = weight.reshape(layers, num_groups, size).sum(-1)
    node, place = balanced_packing(group, num_nodes)
    first = (node * (num_groups // num_nodes) + place) * size
    log2node = (first[:, :, None] + np.arange(size)).reshape(layers, experts)
    node2log = _inverse(log2node)  # experts in the order of their nodes

    on_node = np.take_along_axis(weight, node2log, axis=1).reshape(-1, experts // num_nodes)
    expert, copy, count = replicate(on_node, num_replicas // num_nodes)
    share = np.take_along_axis(on_node / count, expert, axis=1)
    device, place = balanced_packing(share, num_gpus // num_nodes)
    order = _inverse(device * (num_replicas // num_gpus) + place)
    expert, copy = (np.take_along_axis(a, order, axis=1) for a in (expert, copy))
    offset = np.arange(num_nodes)[None, :, None] * (experts // num_nodes)
    local = expert.reshape(layers, num_nodes, -1) + offset
    phy2log = np.take_along_axis(node2log, local.reshape(layers, -1), axis=1)
    copy = copy.reshape(layers, -1)
    logcnt = np.take_along_axis(count.reshape(layers, -1), log2node, axis=1)

    most = num_replicas - experts + 1
    log2phy = np.full((layers, experts * most), -1, np.int64)
    np.put_along_axis(log2phy, phy2log * most + copy, np.arange(num_replicas)[None, :], axis=1)
    return Placement(phy2log, log2phy.reshape(layers, experts, most), logcnt)


def keep_slots(
    phy2log_NxR: Int[np.ndarray, "N R"], before_NxR: Int[np.ndarray, "N R"], devices: int
) -> Int[np.ndarray, "N R"]:
    """The same experts on the same devices, each in the slot that had it before where one did."""
    out = np.full(phy2log_NxR.shape, -1, np.int64)
    size = phy2log_NxR.shape[1] // devices
    for row, (new, old) in enumerate(zip(phy2log_NxR, before_NxR, strict=True)):
        for first in range(0, len(new), size):
            here = list(new[first : first + size])
            for slot in range(first, first + size):
                if old[slot] in here:
                    out[row, slot] = old[slot]
                    here.remove(old[slot])
            for slot in range(first, first + size):
                if out[row, slot] < 0:
                    out[row, slot] = here.pop(0)
    return out


def device_loads(
    weight: Num[np.ndarray, "N E"], placement: Placement, devices: int
) -> Float[np.ndarray, "N devices"]:
    """Load of every device when the tokens of an expert spread evenly over its copies."""
    share = np.asarray(weight, np.float64) / placement.logcnt
    slot = np.take_along_axis(share, placement.phy2log, axis=1)
    return slot.reshape(len(slot), devices, -1).sum(-1)


def contiguous(experts: int, slots: int, devices: int) -> Int[np.ndarray, " R"]:
    """The expert of every slot when nothing is known of loads: experts in order, copies in a ring.

    Device d holds experts d E / devices and the next. What slots there are beyond E are copies of
    the experts of the devices 1, 2, 4, ... places on, one each in turn.
    Errors: ValueError naming what does not divide.
    Source: the copies are LPLB's fixed edges between devices (deepseek-ai/LPLB).
    """
    for name, whole in (("experts", experts), ("slots", slots)):
        if devices < 1 or whole % devices:
            raise ValueError(f"devices: {whole} {name} do not divide by {devices} devices")
    if slots < experts:
        raise ValueError(f"slots: {slots} cannot hold {experts} experts")
    own = np.arange(experts).reshape(devices, -1)
    extra = np.empty((devices, (slots - experts) // devices), np.int64)
    hops = [2**i for i in range(devices.bit_length()) if 2**i < devices] or [0]
    for i in range(extra.shape[1]):
        there = (np.arange(devices) + hops[i % len(hops)]) % devices
        extra[:, i] = own[there, (i // len(hops)) % own.shape[1]]
    return np.concatenate([own, extra], axis=1).ravel()


def settle(
    phy2log: Int[np.ndarray, " R"], holds: Int[np.ndarray, "E D"], nodes: int = 1
) -> Int[np.ndarray, " R"]:
    """The same placement with its devices renamed so that the fewest weights have to move.

    `holds` says what each device holds now. Devices that share a node still share one; loads stay
    what they are, for devices are alike.
    """
    from scipy import optimize

    experts, devices = holds.shape
    slots = phy2log.reshape(devices, -1)
    new = np.zeros((experts, devices), bool)
    new[slots.T, np.arange(devices)] = True
    common = (holds > 0).T.astype(np.int64) @ new  # [D now, D new] experts that need not move
    size = devices // nodes
    named = np.empty((nodes, nodes, size), np.int64)
    gain = np.zeros((nodes, nodes))
    for now in range(nodes):
        for then in range(nodes):
            block = common[now * size : (now + 1) * size, then * size : (then + 1) * size]
            rows, columns = optimize.linear_sum_assignment(block, maximize=True)
            gain[now, then] = block[rows, columns].sum()
            named[now, then] = then * size + columns
    _, taken = optimize.linear_sum_assignment(gain, maximize=True)
    return slots[np.concatenate([named[now, taken[now]] for now in range(nodes)])].ravel()
