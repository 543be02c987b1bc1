"""One self-contained HTML page for a fitted law: constants, intervals, plots, what was left out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain.report import html
from sparse_pretrain.report.charts import FAINT, Chart
from sparse_pretrain.scaling.fit import law, laws, record, tables

CURVES = 8  # sizes or budgets drawn as curves: a colour each


def write(
    fit: record.Fit,
    table: tables.Table,
    path: Path | str,
    *,
    title: str,
    optimal: Sequence[Mapping[str, Any]] = (),
    more: str = "",
) -> Path:
    """Write the page to `path` and return it; `more` is HTML put before the tables."""
    path = Path(path)
    body = (
        f"<h1>{html.text(title)}</h1>"
        f'<p class="soft">{html.text(fit.provenance.get("formula", ""))}; {fit.runs} runs of '
        f"{html.text(table.source)}</p>{cards(fit)}"
        f'<div class="columns">{curve(fit, table)}{residuals(fit, table)}</div>{more}'
        + html.section("Constants", constants(fit), id="constants")
        + html.section("Where compute is best spent", _optimal(optimal), id="optimal")
        + html.section("Left out", _dropped(fit), id="dropped")
        + html.section("Where it holds", _span(fit), id="span")
        + html.section("Where it comes from", _provenance(fit), id="provenance")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(html.page(f"{title}: sparse-pretrain", body), encoding="utf-8")
    os.replace(fresh, path)
    return path


def cards(fit: record.Fit) -> str:
    """The headline numbers."""
    found = [html.card(k, k, html.number(v)) for k, v in fit.constants.items()]
    found.append(html.card("noise", "scatter about the law", f"{100 * fit.noise:.2f} %"))
    if fit.held_out:
        error = f"{100 * fit.held_out['mean_abs_error']:.2f} %"
        found.append(html.card("held_out", "held-out forecast error", error))
    return f'<div class="cards">{"".join(found)}</div>'


def curve(fit: record.Fit, table: tables.Table) -> str:
    """Measured losses over compute, and the law along each size's run of tokens."""
    chart = Chart(x="FLOPs, 6 N D", panels=["loss, nats/token"], height=3.2)
    chart.axes[0].set_xscale("log")
    chart.line(table.flops, table.loss, color=FAINT, linestyle="none", marker="o", markersize=3)
    groups = np.unique(np.round(np.log(table.params), 2))
    picked = groups[np.linspace(0, len(groups) - 1, min(CURVES, len(groups))).round().astype(int)]
    for colour, group in enumerate(picked):
        size = table.take(np.abs(np.log(table.params) - group) < 0.006)
        chart.line(
            size.flops, size.loss, colour=colour, linestyle="none", marker="o", markersize=3.5
        )
        if fit.kind == "chinchilla" and len(np.unique(size.tokens)) > 1:
            tokens = np.geomspace(size.tokens.min(), size.tokens.max(), 40)
            params = np.full(40, np.exp(group))
            features = laws.find(fit.kind).build({"params": params, "tokens": tokens})
            predicted = np.exp(law.values(features, fit.theta))
            chart.line(6 * params * tokens, predicted, colour=colour, linewidth=1.0)
    if fit.kind == "chinchilla":
        flops = np.geomspace(*fit.span["flops"], 60)
        best = [float(laws.optimum(fit.theta, c)[2]) for c in flops]
        chart.line(flops, best, colour=7, linestyle="--", label="best split of compute")
    note = (
        '<p class="soft">Grey: all runs; in colour some sizes, and the law along their tokens.</p>'
    )
    return html.section("Loss over compute", chart.svg("loss over compute") + note, id="curve")


LEAST = 0.01  # percent of the loss


def residuals(fit: record.Fit, table: tables.Table) -> str:
    """How far each run is from the law, in percent of its loss."""
    found = laws.find(fit.kind)
    off = 100 * (table.loss / np.exp(law.values(_features(found, table), fit.theta)) - 1)
    chart = Chart(x="FLOPs, 6 N D", panels=["measured over law, %"], height=2.6)
    chart.axes[0].set_xscale("log")
    chart.line(table.flops, off, linestyle="none", marker="o", markersize=3.5)
    chart.axes[0].axhline(0, linewidth=0.8, color=FAINT)
    limit = max(4 * 100 * fit.noise, 0.5)
    shown = off[np.abs(off) <= limit]
    if len(shown) < len(off):
        chart.axes[0].set_ylim(-limit, limit)
    elif np.abs(off).max() < LEAST:  # rounding is no pattern
        chart.axes[0].set_ylim(-LEAST, LEAST)
    outside = len(off) - len(shown)
    note = f'<p class="soft">{outside} runs lie outside the frame.</p>' if outside else ""
    return html.section("Residuals", chart.svg("residuals") + note, id="residuals")


def _features(found: laws.Law, table: tables.Table) -> np.ndarray:
    return found.build({name: table.column(name) for name in found.columns})


def constants(fit: record.Fit) -> str:
    """Every constant with its interval."""
    rows = []
    for name, value in fit.constants.items():
        low, high = fit.intervals[name]
        rows.append([name, html.number(value, 5), html.number(low), html.number(high)])
    held = fit.held_out
    said = "too few runs to hold any out"
    if held:
        said = (
            f"a fit to the {held['fitted_runs']} runs up to {held['fitted_up_to_flops']:.3g} FLOPs "
            f"forecasts the other {held['forecast_runs']}, up to "
            f"{held['forecast_up_to_flops']:.3g}, within {100 * held['mean_abs_error']:.2f} % on "
            f"average and {100 * held['max_abs_error']:.2f} % at most"
        )
    note = f'<p class="soft">Intervals 95 %, by bootstrap. Held out: {html.text(said)}.</p>'
    return html.table(["constant", "value", "low", "high"], rows, "lnnn") + note


def _optimal(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    body = []
    for row in rows:
        low, high = row["loss_interval"]
        body.append(
            [
                f"{row['flops']:.3g}",
                html.count(row["params"]),
                html.count(row["tokens"]),
                html.number(row["tokens_per_param"], 1),
                html.number(row["loss"]),
                html.Raw(f"{html.number(low)} to {html.number(high)}"),
                row["validity"].split(":")[0],
            ]
        )
    # sentences stand below the table: in a cell they make every row of a narrow screen tall
    notes = dict.fromkeys(row["validity"] for row in rows if ":" in row["validity"])
    said = "".join(f'<p class="soft">{html.text(note)}</p>' for note in notes)
    header = ["FLOPs", "params", "tokens", "tokens/param", "loss", "95 %", "validity"]
    return html.table(header, body, "nnnnnnl") + said


def _dropped(fit: record.Fit) -> str:
    note = f'<p class="soft">Rule: {html.text(fit.rule)}.</p>'
    if not fit.dropped:
        return "<p>No run.</p>" + note
    rows = [
        [
            r["run"],
            html.count(r["params"]),
            html.count(r["tokens"]),
            html.number(r["loss"]),
            r["reason"],
        ]
        for r in fit.dropped
    ]
    return html.table(["run", "params", "tokens", "loss", "reason"], rows, "wnnnw") + note


def _span(fit: record.Fit) -> str:
    rows = [[k, f"{low:.4g}", f"{high:.4g}"] for k, (low, high) in fit.span.items()]
    return html.table(["column", "least", "most"], rows, "lnn")


def _provenance(fit: record.Fit) -> str:
    return html.table(["", ""], [[k, v] for k, v in fit.provenance.items() if v], "lw")
