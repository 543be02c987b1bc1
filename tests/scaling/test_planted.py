"""Planted laws: intervals hold the truth as often as they say, and forecasts are narrow enough.

A hundred sweeps: python3 -m pytest -n 0 -m slow tests/scaling/test_planted.py
"""

import pytest

from sparse_pretrain.scaling import planted


def test_a_few_sweeps_hold_the_truth():
    found = planted.coverage(sweeps=3, bootstrap=200)
    held = sum(found["held"].values())
    assert held >= 10  # of 15: the five constants of a sweep miss together
    assert found["forecast_held"] >= 2
    assert found["half_width_mean"] < 0.015


@pytest.mark.slow
def test_a_hundred_sweeps_hold_the_truth_in_89_to_100():
    found = planted.coverage(sweeps=100)
    for name, held in found["held"].items():
        assert 89 <= held <= 100, (name, held)
    assert found["half_width_worst"] <= 0.015
