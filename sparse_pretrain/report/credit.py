"""The section of a run's page about credit: what each domain's rows were worth to the target."""

import numpy as np

from sparse_pretrain.report import html, workdir
from sparse_pretrain.report.axes import mark_phases, tokens_axis
from sparse_pretrain.report.charts import SERIES, Chart, numbers


def section(run: workdir.Run) -> str:
    """A curve a domain and its sums; nothing for a run that measured none."""
    rows = [r for r in run.metrics if isinstance(r.get("credit"), dict)]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["credit"]))
    worth, tokens = (
        {k: numbers([workdir.section(row, key) for row in rows], k) for k in names}
        for key in ("credit", "credit_tokens")
    )
    sums = {k: (float(np.nansum(worth[k])), float(np.nansum(tokens[k]))) for k in names}
    rates = {k: 1e6 * credit / count if count else 0.0 for k, (credit, count) in sums.items()}
    ranked = sorted(names, key=lambda k: -rates[k])
    body = ""
    if len(rows) > 1:
        x, unit = tokens_axis(run, rows)
        chart = Chart(x=unit, panels=["nats/token per million tokens"], height=2.8)
        for colour, name in enumerate(ranked[: len(SERIES)]):
            each = 1e6 * worth[name] / tokens[name]
            chart.line(x, each, colour=colour, label=name)
        mark_phases(chart, run, unit)
        body = chart.svg("Credit by domain")
    body += html.table(
        ["domain", "tokens", "credit", "per million tokens"],
        [[k, html.number(sums[k][1]), html.number(sums[k][0]), html.number(rates[k])]
         for k in ranked],
        "lnnn",
    )  # fmt: skip
    note = (
        f'<p class="soft">Nats per token of the target that descent along these rows alone would '
        f"save, to first order, in {len(rows)} steps that were measured; below zero they harm it."
        "</p>"
    )
    return html.section("Credit", body + note, id="credit")
