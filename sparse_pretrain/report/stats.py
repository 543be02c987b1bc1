"""Paired comparisons: what a difference between two arms is worth, given its seeds."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Paired:
    """The difference of two arms over shared seeds, with its interval and what it says.

    `verdict` is 'lower' or 'higher' when the whole interval is on one side of zero, else 'tie'.
    """

    mean: float
    low: float
    high: float
    pairs: int
    verdict: str

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] {self.verdict}"


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t interval of independent values: (mean, low, high).

    Errors: ValueError for fewer than two values, a non-finite one, or confidence outside (0, 1).
    Source: Student, "The probable error of a mean", Biometrika 6 (1908).
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values: an interval needs at least 2 values, got {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must lie in (0, 1), got {confidence}")
    bad = [v for v in values if not math.isfinite(v)]
    if bad:
        raise ValueError(f"values: must be finite, got {bad[0]}")
    from scipy.special import stdtrit  # jax brings scipy; its stats package takes a second more

    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def paired(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Paired:
    """The mean of a - b over pairs (same seed, same data) with its Student-t interval.

    Errors: ValueError when the lengths differ, or as `interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs: the arms have {len(a)} and {len(b)} values")
    mean, low, high = interval([x - y for x, y in zip(a, b, strict=True)], confidence)
    verdict = "lower" if high < 0 else "higher" if low > 0 else "tie"
    return Paired(mean=mean, low=low, high=high, pairs=len(a), verdict=verdict)


def ratio(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of `a` over mean of `b`, values that come in pairs: (ratio, low, high).

    A ratio r is inside when the mean of a - r b is not told from zero at this confidence. Where the
    mean of `b` is not told from zero itself, no ratio is ruled out and both ends are infinite.

    Errors: ValueError when the lengths differ or the mean of `b` is zero, or as `interval`.
    Source: Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16 (1954).
    """
    if len(a) != len(b):
        raise ValueError(f"pairs: the arms have {len(a)} and {len(b)} values")
    (over, low_over, _), (under, low_under, _) = (interval(x, confidence) for x in (a, b))
    if not under:
        raise ValueError("ratio: the mean below the line is zero")
    total, *ends = interval([x + y for x, y in zip(a, b, strict=True)], confidence)
    # of the squared half widths: that of the sum holds the covariance twice
    own, other, both = (over - low_over) ** 2, (under - low_under) ** 2, (total - ends[0]) ** 2
    shared = (both - own - other) / 2
    square, middle = under**2 - other, over * under - shared
    if square <= 0:
        return over / under, -math.inf, math.inf
    root = math.sqrt(max(middle**2 - square * (over**2 - own), 0.0))
    return over / under, (middle - root) / square, (middle + root) / square
