"""Schedules over replicas against brute force, linear-programming duality, and their laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_pretrain.sharding import placement, schedule, spill

EVERY = {
    "even": schedule.even,
    "lp": schedule.linear_program,
    "least_loaded": spill.least_loaded,
    "least_loaded at once": lambda load, holds: spill.least_loaded(load, holds, threshold=1.0),
    "row_budget": spill.row_budget,
    "row_budget of one": lambda load, holds: spill.row_budget(load, holds, slots=1),
    "row_budget of none": lambda load, holds: spill.row_budget(load, holds, slots=0),
}


@st.composite
def batches(draw):
    """(loads, copies of each expert on each device): skewed loads, any placement."""
    devices = draw(st.integers(1, 5))
    experts = draw(st.integers(1, 8))
    load = draw(
        st.lists(
            st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10_000)),
            min_size=experts,
            max_size=experts,
        )
    )
    holds = draw(
        st.lists(
            st.lists(st.sampled_from([0, 0, 1, 1, 2]), min_size=devices, max_size=devices),
            min_size=experts,
            max_size=experts,
        )
    )
    holds = np.array(holds)
    holds[np.arange(experts), np.arange(experts) % devices] += 1
    return np.array(load), holds


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=60, deadline=None)
@given(case=batches())
def test_the_laws_of_a_schedule(name, case):
    load, holds = case
    got = EVERY[name](load, holds)
    np.testing.assert_array_equal(got.tokens.sum(1), load)  # nothing lost, nothing doubled
    assert (got.tokens >= 0).all()
    np.testing.assert_array_equal(got.fetched, (got.tokens > 0) & (holds == 0))
    np.testing.assert_array_equal(got.load, got.tokens.sum(0))
    assert got.copies == got.fetched.sum()
    if load.sum():
        np.testing.assert_allclose(got.max_over_mean, got.load.max() / got.load.mean())
    else:
        assert got.max_over_mean == 1
    assert got.overflow == 0 or name.startswith("row_budget of")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("load", [[0] * 8, [1000] + [0] * 7, [1] + [0] * 7, [1, 1, 1] + [0] * 5])
def test_ends_of_the_range(name, load):
    """Nothing to do, one expert takes everything, fewer tokens than devices."""
    load = np.array(load)
    holds = np.repeat(np.eye(4, dtype=int), 2, axis=0)
    got = EVERY[name](load, holds)
    np.testing.assert_array_equal(got.tokens.sum(1), load)
    if name in ("row_budget", "row_budget of one") and load.sum() == 1000:
        assert got.load.tolist() == [250] * 4
        assert got.copies == 3


def test_a_schedule_by_hand():
    load, holds = np.array([7, 2, 3]), np.array([[1, 1], [1, 0], [0, 1]])
    assert schedule.even(load, holds).tokens.tolist() == [[4, 3], [2, 0], [0, 3]]
    assert schedule.linear_program(load, holds).load.tolist() == [6, 6]
    assert schedule.lp_bound(load, holds) == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(case=batches())
def test_even_parts_differ_by_one_token_at_most(case):
    load, holds = case
    got = schedule.even(load, holds)
    part = load // holds.sum(1)
    assert (got.tokens >= part[:, None] * holds).all()
    assert (got.tokens <= (part[:, None] + 1) * holds).all()


def least_over_subsets(load, holds):
    """The program's optimum by duality: tokens that a set of devices alone can compute, shared."""
    devices = holds.shape[1]
    best = 0.0
    for size in range(1, devices + 1):
        for subset in itertools.combinations(range(devices), size):
            outside = np.delete(holds, subset, axis=1)
            best = max(best, load[outside.sum(1) == 0].sum() / size)
    return best


@settings(max_examples=150, deadline=None)
@given(case=batches())
def test_the_program_is_the_optimum_and_rounding_costs_less_than_a_token(case):
    load, holds = case
    best = least_over_subsets(load, holds)
    if load.sum():
        bound = schedule.lp_bound(load, holds)
        assert bound == pytest.approx(best * holds.shape[1] / load.sum(), rel=1e-6)
    got = schedule.linear_program(load, holds)
    assert got.load.max() == math.ceil(best - 1e-9)  # what no whole schedule can be below
    assert not got.copies


def test_the_program_against_every_whole_schedule(rng):
    """Every way to split a few tokens over the copies."""
    for _ in range(15):
        load = rng.integers(0, 5, 4)
        holds = rng.integers(0, 2, (4, 3))
        holds[np.arange(4), rng.integers(0, 3, 4)] = 1
        ways = [
            [
                split
                for split in itertools.product(range(n + 1), repeat=3)
                if sum(split) == n and all(h or not s for h, s in zip(row, split, strict=True))
            ]
            for n, row in zip(load, holds, strict=True)
        ]
        best = min(np.sum(choice, axis=0).max() for choice in itertools.product(*ways))
        assert schedule.linear_program(load, holds).load.max() == best


def test_the_bound_of_slots_against_every_placement(rng):
    """No placement of 4 experts in 6 slots on 3 devices is better than the bound says."""
    tight = 0
    for _ in range(6):
        load = rng.zipf(1.3, 4).clip(max=400)
        bound = schedule.slots_bound(load, 6, 3)
        best = np.inf
        for slots in itertools.product(range(4), repeat=6):
            if len(set(slots)) == 4 and all(slots[i] <= slots[i + 1] for i in (0, 2, 4)):
                holds = schedule.held(np.array(slots), 4, 3)
                best = min(best, least_over_subsets(load, holds) * 3 / load.sum())
        assert bound <= math.ceil(best * load.sum() / 3 - 1e-9) * 3 / load.sum() + 1e-9
        tight += bound >= best - 3 / load.sum()
    assert tight  # it is no empty bound


def test_the_bound_of_slots_by_hand():
    assert schedule.slots_bound(np.array([90, 5, 5, 0]), 4, 2) == 1.8  # no copy to spare
    assert schedule.slots_bound(np.array([90, 4, 4, 2]), 5, 2) == 1.0
    assert schedule.slots_bound(np.array([0, 0]), 2, 2) == 1.0
    with pytest.raises(ValueError, match="3 cannot hold 4"):
        schedule.slots_bound(np.array([1, 1, 1, 1]), 3, 1)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_budget_is_always_met_with_as_many_slots_as_a_device_has_experts(data):
    devices, each = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    some = st.one_of(st.just(0), st.integers(0, 30), st.integers(0, 100_000))
    count = devices * each
    load = np.array(data.draw(st.lists(some, min_size=count, max_size=count)))
    holds = np.repeat(np.eye(devices, dtype=int), each, axis=0)
    got = spill.row_budget(load, holds)
    assert got.overflow == 0
    assert got.load.max() <= -(-load.sum() // devices)
    assert got.fetched.sum(0).max() <= each


@settings(max_examples=100, deadline=None)
@given(case=batches(), slots=st.integers(0, 2))
def test_a_budget_that_is_not_met_is_counted(case, slots):
    load, holds = case
    got = spill.row_budget(load, holds, slots=slots)
    rows = -(-load.sum() // holds.shape[1])
    assert got.overflow == np.maximum(got.load - rows, 0).sum()
    assert got.fetched.sum(0).max() <= slots


def test_without_slots_a_full_device_overflows():
    holds = np.repeat(np.eye(2, dtype=int), 2, axis=0)
    got = spill.row_budget(np.array([8, 0, 1, 1]), holds, slots=0)
    assert got.load.tolist() == [8, 2]
    assert got.overflow == 3


def test_what_is_balanced_is_left_alone(rng):
    load = rng.integers(95, 105, 16)
    holds = np.repeat(np.eye(4, dtype=int), 4, axis=0)
    plain = schedule.even(load, holds)
    for threshold, same in ((1.3, True), (1.0, False)):
        got = spill.least_loaded(load, holds, threshold=threshold, least=1)
        assert (got.tokens == plain.tokens).all() == same
        assert (got.copies == 0) == same


def test_spill_evens_a_hot_device_by_large_pieces():
    load = np.array([1000, 0, 100, 100, 50, 50, 0, 0])
    holds = np.repeat(np.eye(4, dtype=int), 2, axis=0)
    got = spill.least_loaded(load, holds, least=100)
    assert got.load.max() <= 325 + 100
    pieces = got.tokens[got.fetched]
    assert pieces.min() >= 100
    assert got.copies == len(pieces)
    assert got.load[3] == 325  # the least loaded is filled first


@settings(max_examples=60, deadline=None)
@given(case=batches())
def test_spill_never_makes_it_worse(case):
    load, holds = case
    before = schedule.even(load, holds).load.max()
    got = spill.least_loaded(load, holds, threshold=1.0, least=1)
    assert got.load.max() <= before
    assert got.load.max() <= -(-load.sum() // holds.shape[1])  # any piece may be moved


@settings(max_examples=60, deadline=None)
@given(case=batches(), data=st.data())
def test_sources_and_copies_agree(case, data):
    load, holds = case
    ranks = holds.shape[1]
    split = np.array([np.random.default_rng(i).multinomial(n, [1 / ranks] * ranks)
                      for i, n in enumerate(load)]).T  # fmt: skip
    got = schedule.linear_program(split, holds)
    np.testing.assert_array_equal(got.tokens, schedule.linear_program(load, holds).tokens)
    sent = schedule.by_source(split, got.tokens)
    np.testing.assert_array_equal(sent.sum(2), split)
    np.testing.assert_array_equal(sent.sum(0), got.tokens)
    assert (sent >= 0).all()
    for rank in range(ranks):  # what a rank can do itself stays with it
        assert (sent[rank, :, rank] >= np.minimum(split[rank], got.tokens[:, rank])).all()


def test_slots_take_the_tokens_of_their_device(rng):
    load = rng.zipf(1.3, 12).clip(max=5000)
    placed = placement.rebalance_experts(load[None], 16, 4, 2, 8)
    holds = schedule.held(placed.phy2log[0], 12, 8)
    got = schedule.linear_program(load, holds)
    slots = schedule.per_slot(got.tokens, placed.phy2log[0])
    np.testing.assert_array_equal(np.bincount(placed.phy2log[0], slots, 12), load)
    np.testing.assert_array_equal(slots.reshape(8, 2).sum(1), got.load)
    even = schedule.per_slot(schedule.even(load, holds).tokens, placed.phy2log[0])
    assert np.abs(even - load[placed.phy2log[0]] / placed.logcnt[0, placed.phy2log[0]]).max() < 1


def test_mistakes_are_named():
    holds = np.eye(2, dtype=int)
    with pytest.raises(ValueError, match="expert 1 is on no device"):
        schedule.held(np.array([0, 0]), 2, 2)
    with pytest.raises(ValueError, match="3 slots do not divide by 2"):
        schedule.held(np.array([0, 1, 1]), 2, 2)
    with pytest.raises(ValueError, match="3 experts, but the placement has 2"):
        schedule.even(np.array([1, 2, 3]), holds)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        schedule.even(np.array([1, -1]), holds)
    with pytest.raises(ValueError, match="slots: must not be negative, got -1"):
        spill.row_budget(np.array([1, 1]), holds, slots=-1)
    with pytest.raises(ValueError, match="expert 0 has 2 tokens, the schedule 1"):
        schedule.by_source(np.array([[1, 0], [1, 0]]), np.array([[1, 0], [0, 0]]))
