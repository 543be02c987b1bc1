"""Traffic against a loop over tokens, and the bound that limiting nodes gives."""

import numpy as np
import pytest

from sparse_pretrain.sharding import traffic

NODES, DEVICES, SLOTS = 4, 2, 3  # devices of a node, slots of a device


def assigned(rng, tokens, seats):
    every = NODES * DEVICES * SLOTS
    slot = np.stack([rng.permutation(every)[:seats] for _ in range(tokens)])
    slot[rng.random(slot.shape) < 0.1] = -1
    return slot, rng.integers(0, NODES * DEVICES, tokens)


def looped(slot, home):
    within = between = onward = away = 0
    for row, device in zip(slot, home, strict=True):
        node, reached = device // DEVICES, set()
        for s in row[row >= 0]:
            d = s // SLOTS
            n = d // DEVICES
            within += n == node and d != device
            between += n != node
            onward += d % DEVICES != device % DEVICES
            reached.add(n)
        away += len(reached - {node})
    return tuple(10 * int(n) for n in (within, between, onward, away))


@pytest.mark.parametrize("seats", [1, 4, 8])
def test_it_counts_what_a_loop_counts(seats, rng):
    slot, home = assigned(rng, 60, seats)
    got = traffic.count(slot, home, slots_per_device=SLOTS, devices_per_node=DEVICES, row_bytes=10)
    assert got == looped(slot, home)
    assert got.by_node_between <= got.pairs_between


def test_limited_to_two_nodes_a_token_crosses_at_most_twice(rng):
    tokens, per_node = 80, DEVICES * SLOTS
    slot = np.empty((tokens, 6), np.int64)
    for t in range(tokens):
        nodes = rng.permutation(NODES)[:2]
        choices = np.concatenate([n * per_node + np.arange(per_node) for n in nodes])
        slot[t] = rng.permutation(choices)[:6]
    home = rng.integers(0, NODES * DEVICES, tokens)
    got = traffic.count(slot, home, slots_per_device=SLOTS, devices_per_node=DEVICES, row_bytes=1)
    assert got.by_node_between <= 2 * tokens
    assert got.pairs_between > 2 * got.by_node_between  # what going once saves


def test_no_pair_no_traffic():
    nobody = np.full((5, 3), -1)
    got = traffic.count(nobody, np.arange(5), slots_per_device=1, devices_per_node=2, row_bytes=7)
    assert got == (0, 0, 0, 0)
