"""What was measured on chips, held against what is wanted of it, as a page."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kernels_pallas.compiled import amount


@dataclasses.dataclass
class Result:
    """One workload's rows, of every backend. Units of `peak`: FLOP/s of a plain matmul."""

    key: str
    device: str
    versions: dict[str, str]
    date: str
    what: str  # 'parity', 'forward' or 'gradient'
    peak: float
    rows: list[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Return whether any backend failed."""
        return any(row["failed"] for row in self.rows)


class Timings:
    """Rows of one device by op, spec, direction and backend."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = {(r["op"], r["spec"], r["direction"], r["backend"]): r for r in rows
                      if r.get("median")}

    def seconds(self, op: str, spec: str, direction: str, backend: str) -> float | None:
        """Return the median, or None where it was not measured."""
        row = self._rows.get((op, spec, direction, backend))
        return row["median"] if row else None

    def rate(self, op: str, spec: str, direction: str, backend: str) -> float | None:
        """Return FLOP/s of useful work; of the backward pass alone for 'backward'."""
        if direction != "backward":
            row = self._rows.get((op, spec, direction, backend))
            return row["flops_per_second"] if row else None
        both = [self._rows.get((op, spec, d, backend)) for d in ("forward", "gradient")]
        if None in both:
            return None
        (t, f), (more, total) = ((r["median"], r["flops_per_second"] * r["median"])
                                 for r in both if r is not None)
        return (total - f) / (more - t) if more > t else None

    def temp(self, op: str, spec: str, direction: str, backend: str) -> float | None:
        """Return the bytes beside arguments and results."""
        row = self._rows.get((op, spec, direction, backend))
        return row["temp_bytes"] if row else None

    def best(self, op: str, spec: str, direction: str) -> float | None:
        """Return the median of the fastest backend."""
        found = [r["median"] for key, r in self._rows.items() if key[:3] == (op, spec, direction)]
        return min(found, default=None)

    def over(self, *, slow: float | None, fast: float | None) -> float | None:
        """Return how many times as long the slow one takes."""
        return slow / fast if slow and fast else None


@dataclasses.dataclass(frozen=True)
class Bar:
    """What is wanted of an H200: a number, at least or at most so large."""

    text: str
    wanted: float
    found: Callable[[Timings], float | None]
    unit: str = "FLOP/s"
    at_most: bool = False


def _rate(op: str, spec: str, direction: str, wanted: float) -> Bar:
    return Bar(f"{op} {spec}, {direction}", wanted,
               lambda t: t.rate(op, spec, direction, "mosaic_gpu"))


def _against_dense(kind: str, length: str, wanted: float) -> Bar:
    spec, dense = f"{kind}_{length}", f"{kind}_dense_{length}"
    return Bar(f"block_sparse {spec}, gradient: times as fast as the best dense attention", wanted,
               lambda t: t.over(slow=t.best("flash", dense, "gradient"),
                                fast=t.seconds("block_sparse", spec, "gradient", "mosaic_gpu")),
               "x")


def _against_cudnn(direction: str) -> Bar:
    spec = "heads_128_16k"
    return Bar(f"flash {spec}, {direction}: cuDNN's time over ours", 0.95,
               lambda t: t.over(slow=t.seconds("flash", spec, direction, "cudnn"),
                                fast=t.seconds("flash", spec, direction, "mosaic_gpu")), "x")


def _against_bfloat16(spec: str, op: str, other: str) -> Bar:
    return Bar(f"scaled_matmul {spec}, gradient: times as fast as bfloat16", 1.5,
               lambda t: t.over(slow=t.best(op, other, "gradient"),
                                fast=t.seconds("scaled_matmul", spec, "gradient", "mosaic_gpu")),
               "x")


BARS = (
    *(_rate("grouped_matmul", spec, direction, 550e12)
      for spec in ("olmoe", "olmoe_down", "deepseek_v3", "deepseek_v3_down")
      for direction in ("forward", "gradient")),
    _rate("flash", "heads_128_16k", "forward", 600e12),
    _rate("flash", "heads_128_16k", "backward", 500e12),
    *(_against_cudnn(direction) for direction in ("forward", "gradient")),
    *(_against_dense(kind, length, wanted) for kind in ("moba", "nsa")
      for length, wanted in (("8k", 1.0), ("64k", 5.0))),
    *(_rate("token_sparse", spec, "backward", 300e12)
      for spec in ("dsa_v2_lite_4k", "dsa_v3_64k", "csa_v4_64k")),
    *(_rate("cross_entropy", spec, "gradient", 600e12) for spec in ("gemma2_2b", "deepseek_v3")),
    Bar("cross_entropy gemma2_2b, gradient: memory", 1.2e9, lambda t: t.temp(
        "cross_entropy", "gemma2_2b", "gradient", "mosaic_gpu"), "B", at_most=True),
    _against_bfloat16("deepseek_v3", "linear", "deepseek_v3"),
    _against_bfloat16("deepseek_v3_experts", "grouped_matmul", "deepseek_v3"),
)


def _number(x: float | None, unit: str) -> str:
    if x is None:
        return "not measured"
    return f"{x:.2f}x" if unit == "x" else amount(x, unit)


def _verdict(bar: Bar, x: float | None) -> str:
    if x is None:
        return "-"
    return "met" if (x <= bar.wanted if bar.at_most else x >= bar.wanted) else "MISSED"


def _grid(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *lines)]


def _speed(row: dict[str, Any]) -> list[str]:
    head = [row["op"], row["spec"], row.get("direction", "-"), row.get("backend", "-")]
    if not row.get("median"):
        return [*head, f"FAILED {row.get('error')}", *[""] * 4]
    spread = f"{1e3 * row['median']:.4g} [{1e3 * row['low']:.4g}, {1e3 * row['high']:.4g}]"
    return [*head, spread, amount(row["flops_per_second"], "FLOP/s"), f"{row['of_ceiling']:.0%}",
            amount(row["bytes_per_second"], "B/s"), amount(row["temp_bytes"], "B")]


def _of_device(found: Sequence[Result]) -> list[str]:
    first = found[-1]
    peaks = [r.peak for r in found if r.peak]
    dates = sorted({r.date for r in found})
    lines = [f"## {first.device}", "",
             f"Measured {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'} with "
             + ", ".join(f"{k} {v}" for k, v in first.versions.items())
             + f"; a plain matmul reaches {amount(max(peaks, default=None), 'FLOP/s')}.", ""]
    rows = [row for r in found if r.what != "parity" for row in r.rows]
    timings = Timings(rows)
    if "H200" in first.device:
        lines += ["### What is wanted", "", *_grid(("what", "wanted", "found", ""), [
            (bar.text, f"at {'most' if bar.at_most else 'least'} {_number(bar.wanted, bar.unit)}",
             _number(x, bar.unit), _verdict(bar, x))
            for bar in BARS for x in [bar.found(timings)]]), ""]
    checked = [row for r in found if r.what == "parity" for row in r.rows]
    count = collections.Counter((row["op"], row.get("backend", "-"), bool(row["failed"]))
                                for row in checked)
    if checked:
        names = sorted({key[:2] for key in count})
        lines += ["### Held to float64", "", *_grid(
            ("op", "backend", "agree, and give the same bits twice", "fail"),
            [(*n, str(count[*n, False]), str(count[*n, True])) for n in names]), ""]
        lines += [f"- FAILED {r['op']} {r['spec']} {r.get('backend', '')}: "
                  f"{r.get('error') or r.get('worst')}" for r in checked if r["failed"]]
    if rows:
        lines += ["", "### Speed", "", "Milliseconds: median and quartiles of the rounds; gradient "
                  "is forward and backward; useful work only.", "", *_grid(
                      ("op", "workload", "direction", "backend", "ms", "rate", "of a matmul",
                       "arguments and results", "beside them"), [_speed(row) for row in rows])]
    return [*lines, ""]


def page(results: Sequence[Result]) -> str:
    """Return the page of what was measured last of every workload, a chapter for each device."""
    latest: dict[tuple[str, ...], Result] = {}
    for r in results:
        names = (r.rows[0]["op"], r.rows[0]["spec"]) if r.rows else (r.key,)
        job = (r.device, str(sorted(r.versions.items())), r.what, *names)
        latest.pop(job, None)
        latest[job] = r
    chapters: dict[tuple[str, ...], list[Result]] = {}
    for job, r in latest.items():
        chapters.setdefault(job[:2], []).append(r)
    lines = ["# Measured", "", "Written by `python -m kernels_pallas.measure --markdown`.", ""]
    for found in chapters.values():
        lines += _of_device(found)
    if not chapters:
        lines += ["Nothing yet: PENDING.md."]
    return "\n".join(lines).rstrip()
