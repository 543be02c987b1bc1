"""The section of a run's page about its mixture: each domain's weight and loss as training went."""

import numpy as np

from sparse_pretrain.report import charts, html, workdir
from sparse_pretrain.report.axes import mark_phases, tokens_axis
from sparse_pretrain.report.charts import SERIES, Chart, numbers


def section(run: workdir.Run) -> str:
    """Two curves a domain and the mean weights; nothing for a run without a mixture."""
    rows = [r for r in run.metrics if isinstance(r.get("mixture"), dict)]
    if len(rows) < 2:
        return ""
    weight = {k: _column(rows, "mixture", k) for k in rows[-1]["mixture"]}
    drawn = sorted(weight, key=lambda k: -np.nanmean(weight[k]))[: len(SERIES)]
    x, unit = tokens_axis(run, rows)
    chart = Chart(x=unit, panels=["weight", "nats/token"], height=4.2)
    for colour, name in enumerate(drawn):
        chart.line(x, weight[name], colour=colour)
        loss = charts.smooth(_column(rows, "domain_loss", name), max(1, len(rows) // 40))
        chart.line(x, loss, panel=1, colour=colour, label=name)
    chart.axes[0].set_ylim(bottom=0)
    mark_phases(chart, run, unit)
    mean = workdir.section(run.summary, "mixture")
    table = html.table(
        ["domain", "weight at the end", "mean of all decisions"],
        [[k, html.number(float(weight[k][-1])), html.number(mean.get(k))] for k in drawn],
        "lnn",
    )
    left = len(weight) - len(drawn)
    note = f'<p class="soft">{left} more domains of less weight are not drawn.</p>' if left else ""
    return html.section("Mixture", chart.svg("Mixture of domains") + table + note, id="mixture")


def _column(rows: list[dict], key: str, name: str) -> np.ndarray:
    return numbers([workdir.section(row, key) for row in rows], name)
