"""Placement against EPLB's published example, brute force, and the laws of a placement."""

import itertools

import numpy as np
import pytest

from sparse_pretrain.sharding import placement

# The worked example of EPLB's README: 12 experts in 4 groups, 16 slots, 2 nodes of 4 devices.
WEIGHT = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    got = placement.rebalance_experts(WEIGHT, 16, 4, 2, 8)
    np.testing.assert_array_equal(got.phy2log, PHY2LOG)


@pytest.mark.parametrize(
    ("experts", "slots", "groups", "nodes", "gpus"),
    [(12, 16, 4, 2, 8), (12, 16, 3, 2, 8), (16, 16, 4, 4, 16), (64, 72, 8, 2, 8), (8, 24, 1, 1, 4)],
)
def test_the_laws_of_a_placement(rng, experts, slots, groups, nodes, gpus):
    weight = rng.zipf(1.4, (5, experts)).clip(max=5000)
    weight[0], weight[1] = 0, 7  # nothing seen; all the same
    got = placement.rebalance_experts(weight, slots, groups, nodes, gpus)
    most = slots - experts + 1
    assert got.log2phy.shape == (5, experts, most)
    for layer in range(5):
        counted = np.bincount(got.phy2log[layer], minlength=experts)
        np.testing.assert_array_equal(counted, got.logcnt[layer])
        assert counted.min() >= 1
        for expert in range(experts):
            copies = got.log2phy[layer, expert]
            assert (copies >= 0).sum() == counted[expert]
            assert (got.phy2log[layer, copies[copies >= 0]] == expert).all()
    if groups % nodes == 0:  # a group never leaves its node
        node = np.arange(slots) // (slots // nodes)
        for layer, group in itertools.product(range(5), range(groups)):
            mine = got.phy2log[layer] // (experts // groups) == group
            assert len(set(node[mine])) == 1
    loads = placement.device_loads(weight, got, gpus)
    np.testing.assert_allclose(loads.sum(1), weight.sum(1))
    assert loads.shape == (5, gpus)


def test_copies_are_as_good_as_any(rng):
    """Every way to deal 5 more copies among 4 experts: none has a smaller largest share."""
    for _ in range(20):
        weight = rng.integers(1, 100, (1, 4))
        _, _, count = placement.replicate(weight, 9)
        best = min(
            max(w / (1 + c) for w, c in zip(weight[0], extra, strict=True))
            for extra in itertools.product(range(6), repeat=4)
            if sum(extra) == 5
        )
        np.testing.assert_allclose((weight / count).max(), best)


def test_packing_is_within_a_third_of_the_best(rng):
    """Graham's bound for heaviest first, 4/3 of the optimum, holds with equal counts on these."""
    for _ in range(20):
        weight = rng.integers(1, 50, (1, 6))
        pack, place = placement.balanced_packing(weight, 2)
        assert sorted(pack[0].tolist()) == [0, 0, 0, 1, 1, 1]
        for p in (0, 1):
            assert sorted(place[0, pack[0] == p].tolist()) == [0, 1, 2]
        total = weight.sum()
        best = min(
            max(weight[0, list(half)].sum(), total - weight[0, list(half)].sum())
            for half in itertools.combinations(range(6), 3)
        )
        worst = max(weight[0, pack[0] == p].sum() for p in (0, 1))
        assert worst <= 4 / 3 * best


def test_placing_evens_the_devices(rng):
    weight = (1e5 / np.arange(1, 65) ** 1.0)[None, :]
    before = weight.reshape(8, 8).sum(1)
    got = placement.rebalance_experts(weight, 72, 8, 1, 8)
    after = placement.device_loads(weight, got, 8)[0]
    assert before.max() / before.mean() > 4
    assert after.max() / after.mean() < 1.1


@pytest.mark.parametrize(
    ("args", "named"),
    [((16, 4, 2, 7), "num_gpus"), ((11, 1, 1, 1), "num_replicas"), ((16, 5, 1, 8), "num_groups")],
)
def test_what_does_not_divide_is_named(args, named):
    with pytest.raises(ValueError, match=named):
        placement.rebalance_experts(WEIGHT, *args)


def test_loads_must_be_loads():
    with pytest.raises(ValueError, match="weight"):
        placement.rebalance_experts(WEIGHT - 50, 16, 4, 2, 8)


def test_slots_are_kept_where_a_device_keeps_its_expert(rng):
    for _ in range(50):
        before, new = (rng.integers(0, 6, (2, 12)) for _ in range(2))
        got = placement.keep_slots(new, before, 3)
        for row, old, wanted in zip(got, before, new, strict=True):
            for first in range(0, 12, 4):
                here = slice(first, first + 4)
                assert sorted(row[here]) == sorted(wanted[here])
                # no slot that could have kept its expert was given to another
                kept = int((row[here] == old[here]).sum())
                counts = (np.bincount(a[here], minlength=6) for a in (wanted, old))
                assert kept == np.minimum(*counts).sum()
