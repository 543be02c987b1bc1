"""Intervals against scipy.stats and by simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from sparse_pretrain.report import stats


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_equals_scipy(rng, n, confidence):
    a, b = rng.normal(2.0, 0.1, n), rng.normal(2.1, 0.2, n)
    got = stats.paired(a.tolist(), b.tolist(), confidence)
    want = scipy.stats.ttest_rel(a, b).confidence_interval(confidence)
    assert got.low == pytest.approx(want.low, rel=1e-10)
    assert got.high == pytest.approx(want.high, rel=1e-10)
    assert got.mean == pytest.approx((a - b).mean(), rel=1e-10)
    assert got.pairs == n


@pytest.mark.parametrize(
    ("a", "verdict"),
    [
        ([1.0, 1.1, 0.9], "lower"),
        ([3.0, 3.1, 2.9], "higher"),
        ([1.0, 3.0, 2.1], "tie"),
        ([2.0, 2.0, 2.0], "tie"),
        ([1.9, 1.9, 1.9], "lower"),
    ],
)
def test_verdict(a, verdict):
    assert stats.paired(a, [2.0, 2.0, 2.0]).verdict == verdict


def test_covers_as_often_as_it_says(rng):
    draws = rng.normal(0.0, 1.0, (2000, 5))
    held = [low <= 0 <= high for _, low, high in map(stats.interval, draws.tolist())]
    assert 0.935 < np.mean(held) < 0.965  # three standard errors about 0.95


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("slope", [-0.7, 0.0, 0.9])
def test_ends_of_a_ratio_are_where_a_test_stops_telling(rng, n, slope):
    b = rng.normal(1.0, 0.02, n)
    a = slope * b + rng.normal(0.0, 0.05, n)
    share, low, high = stats.ratio(a.tolist(), b.tolist(), 0.9)
    assert share == pytest.approx(a.mean() / b.mean(), rel=1e-10)
    assert low < share < high
    for end in (low, high):
        assert scipy.stats.ttest_1samp(a - end * b, 0.0).pvalue == pytest.approx(0.1, rel=1e-6)
    middle = scipy.stats.ttest_1samp(a - (low + high) / 2 * b, 0.0).pvalue
    assert middle > 0.1  # between the ends, not outside of them


def test_a_ratio_to_what_may_be_zero_has_no_ends():
    share, low, high = stats.ratio([1.0, 1.1, 0.9], [0.5, -0.4, 0.2])
    assert share == pytest.approx(10.0)
    assert (low, high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="below the line is zero"):
        stats.ratio([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError, match="3 and 2 values"):
        stats.ratio([1.0, 2.0, 3.0], [1.0, 2.0])


def test_mistakes():
    with pytest.raises(ValueError, match="3 and 2 values"):
        stats.paired([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        stats.interval([1.0])
    with pytest.raises(ValueError, match="finite, got nan"):
        stats.interval([1.0, math.nan])
    with pytest.raises(ValueError, match=r"confidence: must lie in \(0, 1\), got 95"):
        stats.interval([1.0, 2.0], 95)
