"""The section of a run's page about the market of its experts."""

import numpy as np

from sparse_pretrain.report import html, workdir
from sparse_pretrain.report.axes import tokens_axis
from sparse_pretrain.report.charts import Chart


def prices(run: workdir.Run, most: int) -> str:
    """What experts cost, where the router has a market: prices, dual objective, duality gap.

    `most` layers are drawn.
    """
    rows = [r for r in run.moe if r.get("price")]
    if not rows:
        return ""
    try:
        price = np.array(rows[-1]["price"], np.float64)
        dual = np.array([r["objective"] for r in rows if r.get("objective")], np.float64)
    except (TypeError, ValueError):
        return ""
    if price.ndim != 2 or not np.isfinite(price).all():
        return ""
    chart = Chart(x="experts, cheapest first", panels=["price less the mean"], height=2.4)
    ranked = np.sort(price - price.mean(1, keepdims=True), axis=1)
    for i, layer in enumerate(ranked[:most]):
        chart.line(np.arange(len(layer)), layer, colour=i, label=f"layer {i}", linewidth=1.1)
    body = chart.svg("Expert prices")
    if dual.ndim == 2 and len(dual) > 1:
        x, unit = tokens_axis(run, [r for r in rows if r.get("objective")])
        chart = Chart(x=unit, panels=["dual objective per token"], height=2.4)
        chart.line(x, dual.mean(1), label="mean of layers")
        body += chart.svg("Dual objective")
    gap = run.result("duality_gap")
    if isinstance(gap, (int, float)) and np.isfinite(gap):
        body += (
            f'<p>Duality gap on the held-out text: {html.number(gap)} of score per token, mean '
            "over layers; 0 would prove that no balanced assignment is better.</p>"
        )
    note = (
        '<p class="soft">Prices at the last look: a token '
        "buys the experts with the highest score less price. The dual objective is what the best "
        "balanced assignment cannot exceed.</p>"
    )
    return html.section("Expert market", body + note, id="market")
