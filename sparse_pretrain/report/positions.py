"""Loss by position in the document: whether a model makes use of what lies far behind."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_pretrain.report import html, workdir
from sparse_pretrain.report.charts import Chart

KEYS = ("from", "to", "nats_per_token", "tokens")


def buckets(run: workdir.Run) -> list[dict[str, Any]]:
    """The rows of `by_position` of the last evaluation; none where they are absent or broken."""
    rows = run.result("by_position")
    if not isinstance(rows, list):
        return []
    ok = all(
        isinstance(r, dict) and all(isinstance(r.get(k), (int, float)) for k in KEYS) for r in rows
    )
    return rows if ok else []


def section(run: workdir.Run) -> str:
    """A curve and a table; nothing where the rows are too short for three buckets."""
    rows = buckets(run)
    if len(rows) < 3:
        return ""
    table = html.table(
        ["tokens before it", "nats/token", "targets"],
        [
            [
                f"{r['from']} to {r['to'] - 1}",
                html.number(r["nats_per_token"]),
                html.count(r["tokens"]),
            ]
            for r in rows
        ],
        "lnn",
    )
    return html.section("Held-out text by position", _chart({0: rows}) + table, id="positions")


def compared(arms: Sequence[Sequence[workdir.Run]]) -> str:
    """The mean curve of each arm's runs, where all have the same buckets; colours by place."""
    curves = {}
    for place, runs in enumerate(arms):
        rows = [r for r in map(buckets, runs) if r]
        edges = {tuple((b["from"], b["to"]) for b in r) for r in rows}
        if len(edges) == 1 and len(rows[0]) >= 3:
            mean = np.mean([[b["nats_per_token"] for b in r] for r in rows], axis=0)
            curves[place] = [b | {"nats_per_token": m} for b, m in zip(rows[0], mean, strict=True)]
    return html.section("Held-out text by position", _chart(curves), id="positions")


def _chart(curves: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    if not curves:
        return ""
    chart = Chart(x="tokens of the document before it", panels=["nats/token"], height=2.8)
    for colour, rows in curves.items():
        middle = [(row["from"] + row["to"]) / 2 for row in rows]
        chart.points(middle, [row["nats_per_token"] for row in rows], colour=colour)
    chart.axes[0].set_xscale("log", base=2)  # buckets double
    chart.axes[0].xaxis.set_major_formatter(lambda v, _: f"{v:.0f}")
    return chart.svg("Loss by position")
