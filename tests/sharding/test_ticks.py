"""Pipeline schedules: every op once, after what it needs, and as long as the formulas say."""

import numpy as np
import pytest

from sparse_pretrain.sharding import ticks
from sparse_pretrain.sharding.ticks import BACKWARD, FORWARD, WEIGHTS

SIZES = [(S, M) for S in (1, 2, 3, 4, 5, 8) for M in (1, 2, 3, 4, 7, 8, 20)]
ALL = [(name, S, M) for name in ticks.SCHEDULES for S, M in SIZES]


@pytest.mark.parametrize("name", ticks.SCHEDULES)
def test_every_op_runs_once_and_after_what_it_needs(name):
    for S, M in SIZES:
        table = ticks.table(name, S, M)
        kinds = [FORWARD, BACKWARD] + [WEIGHTS] * (name == "zero_bubble")
        when = {}
        for t, (ops, micros) in enumerate(zip(table.op, table.micro, strict=True)):
            for s, (op, m) in enumerate(zip(ops, micros, strict=True)):
                if op:
                    assert (op, s, m) not in when, (S, M)
                    when[op, s, m] = t
                else:
                    assert m == -1
        assert set(when) == {(k, s, m) for k in kinds for s in range(S) for m in range(M)}
        for (op, s, m), t in when.items():
            needs = []
            if op == FORWARD and s > 0:
                needs = [(FORWARD, s - 1, m)]
            elif op == BACKWARD:
                needs = [(FORWARD, s, m)] + [(BACKWARD, s + 1, m)] * (s < S - 1)
            elif op == WEIGHTS:
                needs = [(BACKWARD, s, m)]
            assert all(when[n] < t for n in needs), (S, M, op, s, m)


@pytest.mark.parametrize(("S", "M"), SIZES)
def test_ticks_are_those_of_the_published_formulas(S, M):
    """2104.04473, section 2.2: (S - 1)(F + B); 2401.10241, section 2.3: (S - 1)(F + B - W)."""
    for name in ("gpipe", "1f1b"):
        table = ticks.table(name, S, M)
        assert (table.ticks, table.idle) == (2 * M + 2 * (S - 1), 2 * (S - 1))
        assert table.bubble == pytest.approx((S - 1) / M)
    table = ticks.table("zero_bubble", S, M)
    # with fewer micro-batches than stages there are too few W to fill the end with
    wait = S - 1 + max(S - M, 0)
    assert (table.ticks, table.idle) == (3 * M + wait, wait)


@pytest.mark.parametrize(("S", "M"), [(2, 5), (4, 8), (4, 16), (8, 16), (8, 40)])
def test_unequal_ops_take_the_formulas_time_too(S, M):
    """A stage waits for nobody it need not wait for: in lockstep a tick takes its slowest op."""
    for f, b in ((1, 3), (1, 2), (2, 5), (1, 1.5)):
        for name in ("gpipe", "1f1b"):
            assert ticks.table(name, S, M).seconds(f, b) == pytest.approx((M + S - 1) * (f + b))
    for f, b, w in ((1, 2, 1), (2, 5, 1), (1, 2.6, 0.4)):
        found = ticks.table("zero_bubble", S, M).seconds(f, b, w)
        assert found == pytest.approx(M * (f + b + w) + (S - 1) * (f + b - w))


@pytest.mark.parametrize(("S", "M"), SIZES)
def test_no_stage_has_more_in_flight_than_its_schedule_allows(S, M):
    assert ticks.table("gpipe", S, M).in_flight == (M,) * S
    found = ticks.table("1f1b", S, M)
    assert found.in_flight == tuple(min(S - s, M) for s in range(S))
    assert found.slots <= min(S, M)
    assert found.delayed == 0
    found = ticks.table("zero_bubble", S, M)
    assert max(found.in_flight) <= min(S + 1, M), "one more than 2401.10241, section 2.1: see table"
    assert found.slots <= min(S, M)
    assert found.delayed <= min(S, M)


@pytest.mark.parametrize(("name", "S", "M"), [(n, S, M) for n, S, M in ALL if S > 1])
def test_what_the_executor_does_with_messages_is_right(name, S, M):
    """A device that follows the table finds each input in its slot, and each gradient just come."""
    table = ticks.table(name, S, M)
    inputs = [[None] * table.slots for _ in range(S)]
    kept = [[None] * max(table.delayed, 1) for _ in range(S)]
    back = [None] * S
    for t in range(table.ticks):
        out = [None] * S
        for s in range(S):
            op, m = table.op[t, s], table.micro[t, s]
            if op == FORWARD:
                assert s == 0 or inputs[s][m % table.slots] == ("x", m)
                out[s] = ("x", m)
            elif op == BACKWARD:
                assert inputs[s][m % table.slots] == ("x", m)
                assert name == "gpipe" or s == S - 1 or back[s] == ("dx", m)
                out[s] = ("dx", m)
                if table.delayed:
                    kept[s][m % table.delayed] = m
            elif op == WEIGHTS:
                assert kept[s][m % table.delayed] == m
        up, down = (sets[which[t]] for sets, which in (table.up, table.down))
        came_up = [out[s - 1] if s - 1 in up else None for s in range(S)]
        came_down = [out[s + 1] if s + 1 in down else None for s in range(S)]
        for s in range(S):
            arrives = table.arrives[t, s]
            new = out[0] if s == 0 else came_up[s]
            if arrives >= 0:
                inputs[s][arrives % table.slots] = new
                assert new == ("x", arrives)
            if table.returns[t, s]:
                back[s] = came_down[s]
                assert back[s] is not None


def test_a_table_is_drawn_as_in_papers():
    assert str(ticks.table("1f1b", 2, 3)).splitlines() == [
        "F0 F1 .  B0 F2 B1 .  B2",
        ".  F0 B0 F1 B1 F2 B2 .",
    ]
    assert np.array_equal(ticks.table("1f1b", 2, 3).at(BACKWARD, 0), [3, 5, 7])
    with pytest.raises(ValueError, match=r"^pipeline: 'dualpipe' is not one of gpipe, 1f1b, zero"):
        ticks.table("dualpipe", 2, 3)
