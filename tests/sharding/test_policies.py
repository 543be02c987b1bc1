"""Every policy over synthetic traces: laws, what is seen and what is scored, bytes, mistakes."""

import numpy as np
import pytest

from sparse_pretrain.sharding import placement, policies, schedule, traces

SETTING = policies.Setting(experts=16, devices=4, slots=20)


@pytest.fixture(scope="module")
def load():
    return traces.zipf(steps=12, layers=2, experts=16, pairs=4000, exponent=1.0, seed=3)


@pytest.mark.parametrize("name", policies.TABLE)
def test_the_laws_of_a_policy(name, load):
    policy = policies.TABLE[name]
    got = policies.replay(load, policy, SETTING, 4, bounds=True)
    assert got.load.shape == (8, 2, 4)
    np.testing.assert_array_equal(got.load.sum(-1), load[4:].sum(-1))  # every pair is computed
    assert (got.ratio >= 1).all()
    assert got.moved.shape == ((2, 2) if policy.placed else (0, 2))
    assert (got.rehomed <= got.moved).all()
    copied = ("eplb", "lp", "eplb+lp", "search+lp", "eplb+least_loaded")
    assert got.slots == (20 if name in copied else 16) // 4
    if not got.fetched.any():  # a schedule without fetched copies is bound by its placement
        assert (got.ratio >= got.bound - 1e-6).all()
    if policy.scheduler is schedule.linear_program:
        assert (got.load.max(-1) <= np.ceil(got.bound * 1000 - 1e-6)).all()
    if name == "row_budget":
        assert not got.overflow.any()
        assert got.load.max() <= 1000
        assert got.prefetch <= 4
    if name == "eplb+row_budget":
        assert got.prefetch <= SETTING.spare == 1


def test_what_is_scored_was_not_seen(load):
    """The placement of a window is made of the one before: changing the scored does not move it."""
    seen = load.copy()
    seen[8:] = np.roll(load[8:], 5, axis=-1)
    a, b = (policies.replay(x, policies.TABLE["eplb"], SETTING, 4) for x in (load, seen))
    np.testing.assert_array_equal(a.moved, b.moved)
    np.testing.assert_array_equal(a.load[:4], b.load[:4])
    assert (a.load[4:] != b.load[4:]).any()
    placed = placement.rebalance_experts(load[:4].sum(0), 20, 1, 1, 4)
    even = placement.device_loads(load[4], placed, 4)
    assert np.abs(a.load[0] - even).max() <= 5  # whole tokens: a copy is off by less than one


def test_a_steady_load_is_placed_once():
    load = np.broadcast_to(np.arange(16)[::-1] ** 2, (9, 1, 16)).copy()
    got = policies.replay(load, policies.TABLE["eplb"], SETTING, 3)
    assert got.moved.tolist()[1:] == [[0]]
    assert got.rehomed.tolist()[1:] == [[0]]
    assert got.moved[0, 0] > 0


def test_none_is_experts_in_order_and_never_moves(load):
    got = policies.replay(load, policies.TABLE["none"], SETTING, 4)
    np.testing.assert_array_equal(got.load, load[4:].reshape(8, 2, 4, 4).sum(-1))
    assert got.moved.size == got.fetched.sum() == got.overflow.sum() == 0


def test_the_order_one_expects(load):
    """No row is held to the letter; what schedules per batch beats what does not, on a trace."""
    made = policies.replays(load, list(policies.TABLE), SETTING, 4)
    got = {name: replay.expert_time for name, replay in made.items()}
    assert got["search+lp"] < got["eplb+lp"] < got["eplb"] < got["none"]
    assert got["lp"] < got["none"]
    assert got["row_budget"] == pytest.approx(1.0)
    assert got["least_loaded"] < 1.3 + 1e-9


def test_the_ring_and_what_does_not_divide():
    got = placement.contiguous(8, 16, 4).reshape(4, 4)
    assert got.tolist() == [[0, 1, 2, 4], [2, 3, 4, 6], [4, 5, 6, 0], [6, 7, 0, 2]]
    assert placement.contiguous(4, 4, 1).tolist() == [0, 1, 2, 3]
    assert placement.contiguous(2, 4, 1).tolist() == [0, 1, 0, 1]
    for args, named in (((6, 8, 4), "6 experts"), ((8, 9, 4), "9 slots"), ((8, 4, 4), "cannot")):
        with pytest.raises(ValueError, match=named):
            placement.contiguous(*args)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_devices_renamed_are_the_same_devices(rng, nodes):
    old = schedule.held(rng.permutation(np.arange(24) % 16), 16, 8)
    new = rng.permutation(np.arange(24) % 16)
    got = placement.settle(new, old, nodes)
    size = 24 // nodes
    assert sorted(map(sorted, got.reshape(8, 3).tolist())) == sorted(
        map(sorted, new.reshape(8, 3).tolist())
    )
    groups = [sorted(x) for x in got.reshape(nodes, size).tolist()]
    assert sorted(groups) == sorted(sorted(x) for x in new.reshape(nodes, size).tolist())

    def moves(slots):
        return ((schedule.held(slots, 16, 8) > 0) & (old == 0)).sum()

    assert moves(got) <= moves(new)
    # what was only renamed settles back
    renamed = np.arange(24).reshape(nodes, 8 // nodes, 3)[::-1, ::-1].reshape(8, 3)
    now = np.arange(24) % 16
    assert (placement.settle(now[renamed.ravel()], schedule.held(now, 16, 8), nodes) == now).all()


def test_slots_divide_by_devices():
    assert policies.slots_for(64, 8, 0.125) == 72
    assert policies.slots_for(64, 32, 0.125) == 96  # at least one more for each
    assert policies.slots_for(256, 32, 0.125) == 288
    assert policies.slots_for(30, 3, 0.1) == 33
    assert policies.slots_for(16, 4, 0.0) == 16


def test_a_step_is_as_fast_as_its_busiest_device():
    load = np.array([[[4, 0, 0, 0]]] * 2)
    setting = policies.Setting(experts=4, devices=4, slots=4)
    before = policies.replay(load, policies.TABLE["none"], setting, 1)
    after = policies.replay(load, policies.TABLE["row_budget"], setting, 1)
    assert before.expert_time == 4
    assert after.expert_time == 1
    assert policies.step_gain(before, after, 0.5) == pytest.approx(1.5)
    assert policies.step_gain(before, after, 0.0) == 0
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        policies.step_gain(before, after, 1.5)


def test_a_trace_has_the_law_that_was_asked_for():
    load = traces.zipf(
        steps=50, layers=3, experts=32, pairs=20_000, exponent=1.2, drift=0.0, noise=0.0, seed=1
    )
    assert load.shape == (50, 3, 32)
    assert (load.sum(-1) == 20_000).all()
    share = np.sort(load.mean(0), axis=-1)[:, ::-1]
    law = np.arange(1, 33) ** -1.2
    np.testing.assert_allclose(share, np.broadcast_to(20_000 * law / law.sum(), (3, 32)), rtol=0.05)
    again = traces.zipf(
        steps=50, layers=3, experts=32, pairs=20_000, exponent=1.2, drift=0.0, noise=0.0, seed=1
    )
    np.testing.assert_array_equal(load, again)


def test_a_trace_drifts_slowly_and_varies_quickly():
    common = dict(steps=400, layers=1, experts=16, pairs=10**6, exponent=0.0, seed=2)
    slow = np.log(traces.zipf(**common, drift=0.5, memory=50.0, noise=0.0)[:, 0])
    quick = np.log(traces.zipf(**common, drift=0.0, noise=0.3)[:, 0])

    def alike(x, gap):  # correlation of steps so far apart
        x = x - x.mean(1, keepdims=True)
        return (x[gap:] * x[:-gap]).mean() / (x * x).mean()

    assert alike(slow, 1) > 0.95
    assert 0.5 < alike(slow, 20) < 0.85  # exp(-20 / 50) is 0.67
    assert abs(alike(quick, 1)) < 0.05
    assert 0.25 < (quick - quick.mean(1, keepdims=True)).std() < 0.35


def test_recorded_rows_are_read():
    rows = [
        {"step": 1, "load": [[3.0, 1.0], [2.0, 2.0]]},
        {"step": 2},
        {"step": 4, "load": [[4.0, 0.0], [1.0, 3.0]]},
    ]
    got = traces.from_rows(rows)
    assert got.dtype == np.int64
    assert got.tolist() == [[[3, 1], [2, 2]], [[4, 0], [1, 3]]]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no row has the loads"),
        ([{"load": []}, {"load": None}], "no row has the loads"),
        ([{"load": [[1, 2]]}, {"load": [[1, 2, 3]]}], r"row 2 has the shape \(1, 3\), before"),
        ([{"load": [[1, 2], [1]]}], "row 1 has the shape"),
        ([{"load": [[0.5, 0.5]]}], "row 1 holds no whole numbers"),
        ([{"load": [[1, -1]]}], "row 1 holds no whole numbers"),
        ([{"load": [[1, None]]}], "row 1"),
    ],
)
def test_what_is_no_trace_is_named(rows, named):
    with pytest.raises(ValueError, match=named):
        traces.from_rows(rows)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda load: policies.Setting(experts=16, devices=3, slots=18), "16 experts do not"),
        (lambda load: policies.Setting(experts=16, devices=4, slots=18), "18 slots do not divide"),
        (lambda load: policies.Setting(experts=16, devices=4, slots=12), "12 cannot hold 16"),
        (lambda load: policies.Setting(experts=16, devices=4, slots=16, nodes=3), "nodes: 4 dev"),
        (lambda load: policies.slots_for(16, 4, -0.1), "redundant: must not be negative"),
        (lambda load: policies.slots_for(16, 5, 0.1), "16 experts do not divide by 5"),
        (lambda load: policies.replays(load, ["eplp"], SETTING, 4), "unknown 'eplp'"),
        (lambda load: policies.replays(load, ["none"], SETTING, 7), "12 recorded steps are fewer"),
        (lambda load: policies.replays(load, ["none"], SETTING, 0), "window: must be positive"),
    ],
)
def test_mistakes_are_named(load, make, named):
    with pytest.raises(ValueError, match=named):
        make(load)
