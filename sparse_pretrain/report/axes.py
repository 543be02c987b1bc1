"""What the charts of a run share: where its rows lie on the x axis."""

from typing import Any

import numpy as np

from sparse_pretrain.report import workdir
from sparse_pretrain.report.charts import Chart, numbers


def tokens_axis(run: workdir.Run, rows: list[dict[str, Any]]) -> tuple[np.ndarray, str]:
    """Where rows lie on the x axis: tokens, or steps in files that do not count tokens."""
    x = numbers(rows, "tokens")
    if np.isfinite(x).all():
        return x, "tokens"
    step, per_step = numbers(rows, "step"), None
    if run.metrics and run.metrics[-1].get("step"):
        tokens = run.metrics[-1].get("tokens")
        per_step = tokens / run.metrics[-1]["step"] if tokens else None
    return (step * per_step, "tokens") if per_step else (step, "steps")


def mark_phases(chart: Chart, run: workdir.Run, unit: str) -> None:
    """A line with its name where each phase of the run begins, as far as the run has come."""
    rows = run.derived.get("phases")
    last = numbers(run.metrics[-1:], "tokens" if unit == "tokens" else "step")
    for row in rows if isinstance(rows, list) and last.size else []:
        begin = row["start_tokens"] if unit == "tokens" else row["first_step"] - 1
        if 0 < begin < last[0]:
            chart.mark(begin, row["name"])
