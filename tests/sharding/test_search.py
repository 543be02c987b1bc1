"""The search for placements: it keeps a placement's laws, and is held to the linear program."""

import numpy as np
import pytest

from sparse_pretrain.sharding import placement, policies, schedule, search, traces


@pytest.fixture
def case(rng):
    """(placement of EPLB [R], loads to come [K, E]) for 16 experts in 24 slots on 8 devices.

    Experts stay on one of two nodes, and change their load by half from one time to the next.
    """
    load = rng.permutation(1 / np.arange(1, 17))
    seen = np.stack([load, load * np.exp(0.5 * rng.normal(size=16))])
    placed = placement.rebalance_experts(seen.sum(0)[None], 24, 2, 2, 8).phy2log[0]
    return placed, search.futures(seen, 8, seed=1)


def optimum(load_KxE, slots, devices):
    """The mean of the linear program's optima, in millionths of the load."""
    holds = schedule.held(slots, load_KxE.shape[1], devices)
    whole = np.round(1e6 * load_KxE).astype(np.int64)
    return np.array([schedule.lp_bound(x, holds) for x in whole])


def test_prices_come_close_to_the_program_and_never_below(case):
    placed, load = case
    holds = schedule.held(placed, 16, 8)
    got, device, _ = search.balanced(load, holds, np.zeros((8, 8)), 200)
    best = optimum(load, placed, 8)
    assert (got >= best - 1e-4).all()
    assert (got / best).mean() < 1.03
    np.testing.assert_allclose(device.sum(1), 8)  # in units of the mean load
    np.testing.assert_allclose(device.max(1), got)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_search_keeps_every_expert_and_helps_the_program(case, nodes):
    placed, load = case
    got = search.improve(placed, load, 8, nodes=nodes, rounds=200)
    assert set(got.tolist()) == set(range(16))
    before, after = (optimum(load, slots, 8).mean() for slots in (placed, got))
    assert after < before if nodes == 1 else after <= before  # a full node stays full
    for node in range(nodes):  # nothing crosses nodes
        part = slice(node * 24 // nodes, (node + 1) * 24 // nodes)
        assert set(got[part].tolist()) == set(placed[part].tolist())
    again = search.improve(placed, load, 8, nodes=nodes, rounds=200)
    np.testing.assert_array_equal(got, again)


def test_nothing_to_search():
    load = np.ones((2, 4)) / 4
    placed = np.arange(4)
    np.testing.assert_array_equal(search.improve(placed, load, 4), placed)
    np.testing.assert_array_equal(search.improve(placed, load, 1), placed)


def test_futures_vary_as_the_window_did():
    calm = np.full((8, 6), 100)
    wild = calm.copy()
    wild[4:] = [20, 500, 100, 100, 20, 500]
    for seen, low, high in ((calm, 0.02, 0.08), (wild, 0.8, 3.0)):
        got = search.futures(seen, 400)
        np.testing.assert_allclose(got.sum(1), 1)
        assert (got > 0).all()
        assert low < np.log(got).std(0).mean() < high
    assert (search.futures(np.zeros((3, 4)), 5) > 0).all()


def test_it_moves_fewer_weights_and_evens_more_than_eplb():
    load = traces.zipf(steps=24, layers=2, experts=32, pairs=60_000, exponent=1.0, seed=5)
    setting = policies.Setting(experts=32, devices=8, slots=40)
    ours, eplb = (
        policies.replay(load, policies.TABLE[n], setting, 8) for n in ("search+lp", "eplb+lp")
    )
    assert ours.expert_time < eplb.expert_time
    assert ours.moved.sum() < eplb.moved.sum()
