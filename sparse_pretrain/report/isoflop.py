"""The page of an iso-FLOP grid: the parabolas, the law of each arm, leverage, the next run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain.report import fits, html
from sparse_pretrain.report.charts import Chart


def write(said: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the page of what `isoflop.analyse` said to `path` and return it."""
    body = f"<h1>Iso-FLOP grid</h1><p class='soft'>{len(rows)} finished runs</p>"
    for place, arm in enumerate(said["arms"]):
        body += _arm(place, arm, said, [row for row in rows if row["arm"] == arm])
    body += html.section("Efficiency leverage", _leverage(said), id="leverage")
    body += html.folded("Runs", _runs(rows), id="runs")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html.page("Iso-FLOP grid: sparse-pretrain", body), encoding="utf-8")
    return path


def _arm(place: int, arm: str, said: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    own, fit = said["arms"][arm], said["fits"][arm]
    body = plot(arm, own, rows) + _vertices(own)
    if fit is None:
        body += f"<p>No law: {html.text(own['why'])}.</p>"
    else:
        body += fits.constants(fit) + fits.residuals(fit, said["tables"][arm]) + _next(own)
        body += f"<p class='soft'>Left out: {len(fit.dropped)}; rule: {html.text(fit.rule)}.</p>"
    return html.section(arm, body, id=f"arm-{place}")


def plot(arm: str, own: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss over size, a colour per budget, with the budget's parabola and its least point."""
    chart = Chart(x="params (FLOPs per token over 6)", panels=["loss, nats/token"], height=3.4)
    chart.axes[0].set_xscale("log")
    vertices = {row["flops"]: row for row in own["parabolas"]}
    for colour, flops in enumerate(sorted({row["budget"] for row in rows})):
        part = sorted((r["params"], r["loss"]) for r in rows if r["budget"] == flops)
        x, y = np.array(part).T
        name = f"{flops:.2g} FLOPs"
        chart.points(x, y, colour=colour, label=name, linestyle="none", markersize=4)
        found = vertices.get(flops)
        if found:
            a, b, c, middle = found["coefficients"]
            at = np.linspace(np.log(x[0]), np.log(x[-1]), 60)
            chart.line(np.exp(at), a * (at - middle) ** 2 + b * (at - middle) + c, colour=colour)
            if found["inside"]:
                x, y = np.array([found["params"]]), np.array([found["loss"]])
                chart.points(x, y, colour=colour, marker="*", markersize=9)
    return chart.svg(f"iso-FLOP curves of {arm}")


def _vertices(own: Mapping[str, Any]) -> str:
    factors = {row["flops"]: row["factor"] for row in own.get("bias", [])}
    rows = [
        [
            f"{v['flops']:.3g}",
            html.count(v["params"]) if v["inside"] else "outside the sizes",
            html.count(v["tokens"]) if v["inside"] else "-",
            html.number(v["loss"]) if v["inside"] else "-",
            html.number(factors.get(v["flops"]), 2, " times"),
        ]
        for v in own["parabolas"]
    ]
    header = ["FLOPs", "best params", "tokens", "loss", "bias under the law"]
    note = f"Known bias: {own['stated_bias']}."
    power = own["exponent"]
    if power:
        note = (
            f"Best params grow as C^{power['exponent']:.3f} [{power['low']:.3f}, "
            f"{power['high']:.3f}] by {power['budgets']} parabolas. {note}"
        )
    return html.table(header, rows, "nnnnn") + f"<p class='soft'>{html.text(note)}</p>"


def _next(own: Mapping[str, Any]) -> str:
    row = own["next"][0]
    return (
        f"<p><b>Buy next:</b> {html.count(row['params'])} params on {html.count(row['tokens'])} "
        f"tokens ({row['flops']:.3g} FLOPs): {html.text(row['why'])}.</p>"
    )


def _leverage(said: Mapping[str, Any]) -> str:
    rows = [
        [
            arm,
            f"{r['flops']:.3g}",
            html.number(r["leverage"], 3),
            html.number(r["interval"][0], 3),
            html.number(r["interval"][1], 3),
        ]
        for arm, found in said["leverage"].items()
        for r in found
    ]
    if not rows:
        return ""
    base = next(iter(said["arms"]))
    note = (
        f"<p class='soft'>Compute that {html.text(base)} needs for the arm's loss, over the arm's, "
        "each at its best size; 95 % intervals by pairs of refits. A dash is no bound.</p>"
    )
    return html.table(["arm", "FLOPs", "leverage", "low", "high"], rows, "wnnnn") + note


def _runs(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [
            r["arm"],
            f"{r['budget']:.3g}",
            r["width"],
            html.count(r["params"]),
            html.count(r["tokens"]),
            html.number(r["loss"]),
            html.number(r["seconds"], 1),
        ]
        for r in rows
    ]
    header = ["arm", "budget", "width", "params", "tokens", "loss", "seconds"]
    return html.table(header, body, "wnnnnnn")
