"""Bytes that expert dispatch sends between devices and nodes, counted from an assignment."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Traffic(NamedTuple):
    """Rows that cross to another device of the same node, and to another node, one way.

    `pairs` when every (token, expert) pair travels alone, `by_node` when a token goes once to each
    node that holds one of its experts and on from there. Units: bytes in all; combining sends the
    same number back.
    """

    pairs_within: int
    pairs_between: int
    by_node_within: int
    by_node_between: int


def count(
    slot_TxC: Int[np.ndarray, "T C"],
    device_T: Int[np.ndarray, " T"],
    *,
    slots_per_device: int,
    devices_per_node: int,
    row_bytes: int,
) -> Traffic:
    """The traffic of one dispatch.

    Shapes: slot of each pair, negative for none; the device that holds each token. Within the
    node that a token reached by `by_node` it lands on the device of its sender's rank.
    Source: DeepSeek-V3, 2412.19437 section 3.2.2, where a token reaches at most 4 nodes.
    """
    there = slot_TxC >= 0
    device = np.where(there, slot_TxC // slots_per_device, -1)
    node = np.where(there, device // devices_per_node, -1)
    home = (device_T // devices_per_node)[:, None]
    within = there & (node == home) & (device != device_T[:, None])
    between = there & (node != home)

    nodes = int(max(node.max(initial=0), (device_T // devices_per_node).max(initial=0))) + 1
    reached = np.zeros((len(slot_TxC), nodes), bool)
    token, seat = np.nonzero(there)
    reached[token, node[token, seat]] = True
    away = reached.copy()
    away[np.arange(len(away)), home[:, 0]] = False
    # in every node the token stands on the device of its sender's rank, and its pairs go on
    rank = (device_T % devices_per_node)[:, None]
    onward = there & (device % devices_per_node != rank)
    rows = (within.sum(), between.sum(), onward.sum(), away.sum())
    return Traffic(*(int(n) * row_bytes for n in rows))
