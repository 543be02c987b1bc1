"""What the page of a sweep says beside the comparison: its state, searches, attempts, and cost."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_pretrain.report import html, workdir
from sparse_pretrain.report.charts import SERIES, Chart

BEST = 20  # trials of a search that the page lists
CHARTS = 8  # searched keys that are drawn


def head(record: Mapping[str, Any], runs: Sequence[workdir.Run]) -> str:
    """Headline numbers, then each search."""
    return _cards(record, runs) + "".join(
        _search(search, str(place)) for place, search in enumerate(record.get("searches", []))
    )


def tail(record: Mapping[str, Any], runs: Sequence[workdir.Run]) -> str:
    """What did not go as it should, and where and from what the runs were made."""
    return html.section("Attempts that did not finish", _attempts(record), id="attempts") + (
        html.section("Where the runs were made", _places(runs), id="places")
    )


def _cards(record: Mapping[str, Any], runs: Sequence[workdir.Run]) -> str:
    states = Counter(child["status"] for child in record["children"])
    total = len(record["children"])
    cards = [html.card("finished", f"of {total} runs finished", states["finished"])]
    for status in ("pruned", "failed", "interrupted", "waiting"):
        if states[status]:
            cards.append(html.card(status, status, states[status]))
    ranking = record.get("ranking") or []
    if ranking:
        best = min(row["bits_per_byte"] for row in ranking)
        cards.append(html.card("best", "bits/byte, the best arm", html.number(best)))
    flops = sum(f for run in runs if isinstance(f := run.result("flops"), (int, float)))
    hours = math.fsum(run.chip_hours or 0.0 for run in runs)
    cards.append(html.card("flops", "FLOPs, counted", html.count(flops)))
    cards.append(html.card("chip_hours", "chip-hours", html.number(hours, 2)))
    return f'<div class="cards">{"".join(cards)}</div>'


def _search(search: Mapping[str, Any], place: str) -> str:
    sign = -1 if search["maximize"] else 1
    done = [row for row in search["rows"] if row["state"] == "complete"]
    done.sort(key=lambda row: sign * row["value"])
    pruner = f", pruned by {search['pruner']}" if search["pruner"] != "none" else ""
    parts = [f"{search[k]} {k}" for k in ("complete", "pruned", "fail", "open") if search[k]]
    note = (
        f'<p class="soft">{html.text(search["sampler"])}{html.text(pruner)}, seed '
        f"{search['seed']}, {search['trials']} trials: {html.text(', '.join(parts))}. A trial is "
        f"chosen from those at least {search['parallel']} before it.</p>"
    )
    keys = search["keys"]
    rows = [
        [n, row["number"], html.number(row["value"]), *(_value(row["overrides"][k]) for k in keys)]
        for n, row in enumerate(done[:BEST], 1)
    ]
    header = ["", "trial", search["metric"], *keys]
    table = html.table(header, rows, "nnn" + "n" * len(keys)) if rows else ""
    more = f'<p class="soft">The best {BEST} of {len(done)}.</p>' if len(done) > BEST else ""
    title = f"Search of {search['experiment']}"
    boxes = html.section(title, note + table + more, id=f"search-{place}")
    charts = "".join(_charts(search, done, place))
    return boxes + (f'<div class="columns">{charts}</div>' if charts else "")


def _value(value: Any) -> Any:
    return html.exact(value, f"{value:.4g}") if isinstance(value, float) else value


def _charts(search: Mapping[str, Any], done: Sequence[Mapping[str, Any]], place: str) -> list[str]:
    """The result by trial, then against each key that takes numbers."""
    if len(done) < 2:
        return []
    title = f"{search['metric']} by trial"
    order = sorted(done, key=lambda row: row["number"])
    chart = Chart(x="trial", panels=[search["metric"]], height=3.0)
    values = [row["value"] for row in order]
    best = max if search["maximize"] else min
    chart.points([r["number"] for r in order], values, linestyle="none")
    running = [best(values[: i + 1]) for i in range(len(values))]
    chart.line([r["number"] for r in order], running, colour=1, label="best so far")
    boxes: list[str] = [html.section(title, chart.svg(f"{title} {place}"), id=f"trials-{place}")]
    for i, key in enumerate(search["keys"][:CHARTS]):
        x = [row["overrides"][key] for row in done]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in x):
            continue
        chart = Chart(x=key, panels=[search["metric"]], height=3.0)
        if min(x) > 0 and max(x) / min(x) >= 8:
            chart.axes[0].set_xscale("log")
        chart.axes[0].scatter(x, [row["value"] for row in done], s=14, color=SERIES[0])
        title = f"{search['metric']} against {key}"
        boxes.append(html.section(title, chart.svg(f"{title} {place}"), id=f"key-{place}-{i}"))
    return boxes


def _attempts(record: Mapping[str, Any]) -> str:
    rows = [
        [child["label"], child["status"], child["attempts"], "; ".join(child["causes"])]
        for child in record["children"]
        if child.get("causes")
    ]
    return html.table(["run", "now", "attempts", "why they ended"], rows, "wlnw") if rows else ""


def _places(runs: Sequence[workdir.Run]) -> str:
    found: dict[tuple[str, ...], list[workdir.Run]] = {}
    for run in runs:
        device, versions = (workdir.section(run.run, k) for k in ("device", "versions"))
        name = run.device or "-"
        jax, commit = str(versions.get("jax") or "-"), str(run.run.get("commit") or "-")
        found.setdefault((name, str(device.get("count", "-")), jax, commit), []).append(run)
    rows = []
    for (name, count, jax, commit), some in sorted(found.items()):
        flops = math.fsum(f for r in some if isinstance(f := r.result("flops"), (int, float)))
        hours = math.fsum(run.chip_hours or 0.0 for run in some)
        dirty = "+" if commit.endswith("+") else ""
        row = [name, count, jax, commit[:12] + dirty * (len(commit) > 12), len(some)]
        rows.append([*row, html.count(flops), html.number(hours, 2)])
    header = ["device", "chips", "jax", "commit", "runs", "FLOPs", "chip-hours"]
    return html.table(header, rows, "wnllnnn") if rows else ""
