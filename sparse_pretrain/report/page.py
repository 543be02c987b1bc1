"""One self-contained HTML page per run, written from the files of its workdir."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain.report import advice, charts, credit, html, market, mixture, positions, workdir
from sparse_pretrain.report.axes import mark_phases, tokens_axis
from sparse_pretrain.report.charts import Chart, numbers

MANY_LAYERS = 6  # more lines than this in one chart cannot be told apart


def write_report(path: Path | str) -> Path:
    """Write `report.html` into the workdir `path` and return where it is.

    Missing files cost their sections only, so a running or broken run can be looked at too.
    Errors: ValueError when the folder holds no run.
    """
    path = Path(path)
    if not workdir.is_workdir(path):
        wanted = ", ".join(workdir.MARKERS)
        raise ValueError(f"workdir: {path} holds no run (none of {wanted})")
    out = path / "report.html"
    fresh = out.with_suffix(".html.tmp")
    fresh.write_text(render(workdir.read(path)), encoding="utf-8")
    os.replace(fresh, out)
    return out


def render(run: workdir.Run) -> str:
    """The page as text."""
    boxes = [
        _losses(run),
        _heldout(run),
        _accuracy(run),
        _domains(run),
        mixture.section(run),
        credit.section(run),
        positions.section(run),
        _optimisation(run),
        _balance(run),
        _load(run),
        market.prices(run, MANY_LAYERS),
        _speed(run),
        _sample(run),
    ]
    below = [
        _next(run),
        html.folded("Config", _config(run), id="config"),
        html.folded("Model and environment", _environment(run), id="environment"),
        html.folded("Data manifest", _manifest(run), id="manifest"),
    ]
    columns = f'<div class="columns">{"".join(boxes)}</div>'
    body = _head(run) + _headline(run) + columns + "".join(below)
    return html.page(f"{run.name}: sparse-pretrain", body)


def _head(run: workdir.Run) -> str:
    kind = {"finished": "good", "failed": "bad"}.get(run.status, "")
    bits = [f'<span class="{kind}">{html.text(run.status)}</span>']
    if run.cause:
        bits.append(f'<span class="bad">{html.text(run.cause)}</span>')
    for key in ("created", "device", "commit"):
        value = run.run.get(key)
        if value:
            shown = _device(value) if isinstance(value, dict) else value
            if key == "commit":  # a '+' says that files differed from it
                shown = str(shown)[:12] + "+" * str(shown).endswith("+")
            bits.append(html.text(shown))
    if run.manifest_hash:
        bits.append(f"corpus {html.text(run.manifest_hash)}")
    bits.append(html.text(run.path.resolve()))
    return f'<h1>{html.text(run.name)}</h1><p class="soft">{" · ".join(bits)}</p>'


def _device(device: dict[str, Any]) -> str:
    """An accelerator by its kind, a CPU by its model and cores."""
    kind = str(device.get("kind", device))
    if device.get("platform") != "cpu" or not device.get("cpu"):
        return kind
    cores = device.get("usable_cores") or device.get("cores") or "?"
    return f"{device['cpu']}, {cores} cores"


def _headline(run: workdir.Run) -> str:
    derived, result = run.derived, run.result
    seconds = result("wall_seconds")
    flops = result("flops")
    if flops is None and result("tokens") and derived.get("train_flops_per_token"):
        flops = result("tokens") * derived["train_flops_per_token"]
    steps = result("steps") or (run.metrics[-1].get("step") if run.metrics else None)
    minutes = None if seconds is None else html.exact(seconds, f"{seconds / 60:.1f}")
    cards = [
        ("bits_per_byte", "held-out bits/byte", html.number(result("bits_per_byte"))),
        ("nats_per_token", "held-out nats/token", html.number(result("nats_per_token"))),
        ("accuracy", "held-out accuracy", html.number(result("accuracy"), 3)),
        ("tokens_per_second", "tokens/s", html.count(result("tokens_per_second"))),
        ("tokens", "tokens", html.count(result("tokens"))),
        ("steps", "steps", html.count(steps)),
        ("total_params", "parameters", html.count(derived.get("total_params"))),
        ("active_params", "active parameters", html.count(derived.get("active_params"))),
        ("flops", "training FLOPs", html.count(flops)),
        ("wall_seconds", "minutes", minutes),
    ]
    if result("mfu") is not None:
        mfu = html.exact(result("mfu"), f"{100 * result('mfu'):.1f} %")
        cards.insert(3, ("mfu", "of peak FLOP/s (MFU)", mfu))
    shown = "".join(html.card(*c) for c in cards if c[2] not in (None, "-"))
    return f'<div class="cards" id="headline">{shown}</div>'


def _losses(run: workdir.Run) -> str:
    loss = numbers(run.metrics, "loss")
    if not np.isfinite(loss).any():
        return ""
    x, unit = tokens_axis(run, run.metrics)
    chart = Chart(x=unit, panels=["nats/token"], height=2.8)
    chart.line(x, loss, alpha=0.3, linewidth=0.8, label="train, each step")
    curve = charts.smooth(loss, max(1, len(loss) // 40))
    chart.line(x, curve, label="train, smoothed")
    held = numbers(run.curve, "nats_per_token")
    if np.isfinite(held).any():
        chart.points(tokens_axis(run, run.eval)[0], held, colour=1, label="held-out", zorder=3)
    # The first steps fall from ln(vocab); the rest of the curve is what one wants to see.
    rest, held = loss[len(loss) // 50 :], held[np.isfinite(held)]
    rest = rest[np.isfinite(rest)]
    if len(rest) > 20:
        low = min(rest.min(), *held, math.inf)
        high = max(float(np.quantile(rest, 0.995)), *held, -math.inf)
        chart.axes[0].set_ylim(low - 0.06 * (high - low), high + 0.1 * (high - low))
    mark_phases(chart, run, unit)
    body = chart.svg("Loss")
    bad = int((~np.isfinite(loss)).sum())
    if bad:
        body += f'<p class="bad">{bad} step(s) had no finite loss.</p>'
    return html.section("Loss", body, id="loss")


def _heldout(run: workdir.Run) -> str:
    bits = numbers(run.curve, "bits_per_byte")
    if np.isfinite(bits).sum() < 2:
        return ""
    x, unit = tokens_axis(run, run.eval)
    chart = Chart(x=unit, panels=["held-out bits/byte"], height=2.8)
    chart.points(x, bits, colour=1)
    mark_phases(chart, run, unit)
    body = chart.svg("Held-out bits per byte")
    last = run.eval[-1]
    if workdir.section(last, "between"):
        some, every = (html.count(row.get("heldout_tokens")) for row in (run.curve[-1], last))
        body += (
            f'<p class="soft">Every point is scored on the same {some} tokens; the results above '
            f"and below on all {every} that are held out.</p>"
        )
    return html.section("Held-out text", body, id="heldout")


def _accuracy(run: workdir.Run) -> str:
    right = numbers(run.curve, "accuracy")
    if not np.isfinite(right).any():
        return ""
    x, unit = tokens_axis(run, run.eval)
    chart = Chart(x=unit, panels=["held-out accuracy"], height=2.8)
    chart.points(x, right, colour=1)
    chart.axes[0].set_ylim(-0.03, 1.03)
    mark_phases(chart, run, unit)
    return html.section("Held-out answers", chart.svg("Held-out accuracy"), id="accuracy")


def _domains(run: workdir.Run) -> str:
    found = workdir.section(run.summary, "per_domain")
    if not found and run.eval:
        found = workdir.section(run.eval[-1], "per_domain")
    rows = {k: v for k, v in found.items() if isinstance(v, dict)}
    if not rows:
        return ""
    values = {k: v.get("bits_per_byte") for k, v in rows.items()}
    finite = [v for v in values.values() if isinstance(v, (int, float)) and math.isfinite(v)]
    top = max(finite, default=0.0)

    def hardest(name: str) -> float:
        value = values[name]
        return -value if isinstance(value, (int, float)) else -math.inf

    table = html.table(
        ["domain", "bits/byte", "", "nats/token", "tokens"],
        [
            [
                name,
                html.number(values[name]),
                html.bar((values[name] or 0.0) / top) if top else "",
                html.number(rows[name].get("nats_per_token"), 3),
                html.count(rows[name].get("tokens")),
            ]
            for name in sorted(rows, key=hardest)
        ],
        "lnbnn",
    )
    return html.section("Held-out text by domain", table, id="domains")


def _optimisation(run: workdir.Run) -> str:
    rate, norm = numbers(run.metrics, "lr"), numbers(run.metrics, "grad_norm")
    panels = [(rate, "learning rate"), (norm, "gradient norm")]
    panels = [(y, label) for y, label in panels if np.isfinite(y).any()]
    if not panels:
        return ""
    x, unit = tokens_axis(run, run.metrics)
    chart = Chart(x=unit, panels=[label for _, label in panels], height=3.2)
    for i, (y, _) in enumerate(panels):
        chart.line(x, y, panel=i, colour=2 + i, linewidth=1.0)
    if len(panels) == 2 and (positive := norm[np.isfinite(norm) & (norm > 0)]).size:
        if positive.max() > 30 * np.median(positive):
            chart.axes[1].set_yscale("log")
    mark_phases(chart, run, unit)
    return html.section(
        "Learning rate and gradient norm", chart.svg("Learning rate"), id="optimisation"
    )


def _per_layer(rows: list[dict[str, Any]]) -> np.ndarray:
    """MaxVio [rows, layers] of the rows that have as many layers as the last."""
    wide = len(rows[-1].get("max_vio") or []) if rows else 0
    return np.array(
        [
            [math.nan if v is None else v for v in r["max_vio"]]
            if len(r.get("max_vio") or []) == wide
            else [math.nan] * wide
            for r in rows
        ],
        np.float64,
    ).reshape(len(rows), wide)


def _balance(run: workdir.Run) -> str:
    vio = _per_layer(run.moe)
    if not vio.size:
        return ""
    x, unit = tokens_axis(run, run.moe)
    chart = Chart(x=unit, panels=["MaxVio"], height=2.8)
    layers = vio.shape[1]
    if layers <= MANY_LAYERS:
        for i in range(layers):
            chart.line(x, vio[:, i], colour=i, label=f"layer {i}", linewidth=1.1)
    else:
        known = np.where(np.isfinite(vio), vio, 0.0)
        chart.line(x, known.mean(1), label="mean of layers")
        chart.line(x, known.max(1), colour=3, label="worst layer", linewidth=1.0)
    chart.axes[0].set_ylim(bottom=0)
    dead = advice.total_dead(run.moe[-1])
    note = (
        '<p class="soft">MaxVio: load of the busiest expert over the even share, minus 1. '
        f'Dead experts at the last look: <span data-key="dead_experts">{dead}</span>.</p>'
    )
    return html.section("Expert balance", chart.svg("MaxVio") + note, id="balance")


def _load(run: workdir.Run) -> str:
    last = next((r["load"] for r in reversed(run.moe) if r.get("load")), None)
    try:
        load = np.array(last, np.float64)
    except (TypeError, ValueError):
        return ""
    if load.ndim != 2 or not np.isfinite(load).all():
        return ""
    note = (
        '<p class="soft">Share of the routed pairs that each expert took at the last look, '
        f"{load.shape[0]} layers of {load.shape[1]} experts; 1 is the even share.</p>"
    )
    return html.section("Expert load", charts.heatmap(load, "Expert load") + note, id="load")


def split_time(run: workdir.Run) -> dict[str, float]:
    """Seconds of the run by use: training steps, compilation, the rest; empty when unknown."""
    wall = run.result("wall_seconds")
    tokens = np.diff(numbers(run.metrics, "tokens"), prepend=0.0)
    rate = numbers(run.metrics, "tokens_per_second")
    known = np.isfinite(tokens) & np.isfinite(rate) & (rate > 0)
    if not wall or not known.any():
        return {}
    compiling = float(run.result("compile_seconds") or 0.0)
    goodput = run.summary.get("goodput")
    if isinstance(goodput, (int, float)):  # without the steps that a crash undid
        training = goodput * wall
    else:
        training = float((tokens[known] / rate[known]).sum())
    training = min(training, max(wall - compiling, 0.0))
    other = max(wall - compiling - training, 0.0)
    return {"training steps": training, "compilation": compiling, "data, eval, saving": other}


def _speed(run: workdir.Run) -> str:
    rate = numbers(run.metrics, "tokens_per_second")
    body = ""
    if np.isfinite(rate).any():
        x, unit = tokens_axis(run, run.metrics)
        chart = Chart(x=unit, panels=["tokens/s"], height=2.4)
        chart.line(x, rate, colour=5, linewidth=0.9)
        high = float(np.nanquantile(rate, 0.99))
        chart.axes[0].set_ylim(0, 1.15 * high if high > 0 else 1.0)
        chart.axes[0].yaxis.set_major_formatter(lambda v, _: charts.si(v))
        body += chart.svg("Throughput")
    parts = split_time(run)
    whole = sum(parts.values())
    if whole:
        rows = [
            [
                name,
                html.number(seconds, 1, " s"),
                html.bar(seconds / whole),
                f"{seconds / whole:.0%}",
            ]
            for name, seconds in parts.items()
        ]
        body += html.table(["time", "", "", ""], rows, "lnbn")
        good = parts["training steps"] / whole
        body += (
            '<p class="soft">Goodput, the share of the time spent in training steps: '
            f'<b data-key="goodput">{html.exact(good, f"{good:.0%}")}</b>.</p>'
        )
    return html.section("Throughput", body, id="throughput")


def _sample(run: workdir.Run) -> str:
    sample = run.summary.get("sample")
    if isinstance(sample, dict):
        sample = f"{sample.get('prompt', '')}{sample.get('text', '')}"
    if not sample:
        return ""
    return html.section("Sample", f"<pre>{html.text(sample)}</pre>", id="sample")


def _next(run: workdir.Run) -> str:
    items = ""
    for why, command in advice.suggest(run):
        line = f"<br>{html.command(command)}" if command else ""
        items += f"<li>{html.text(why)}{line}</li>"
    return html.section("What to try next", f"<ol>{items}</ol>", id="next")


def _config(run: workdir.Run) -> str:
    rows = [[k, _plain(v)] for k, v in workdir.dotted(run.config).items()]
    return html.table(["key", "value"], rows, "lw") if rows else ""


def _environment(run: workdir.Run) -> str:
    parts = {
        "derived": run.derived,
        "versions": workdir.section(run.run, "versions"),
        "device": workdir.section(run.run, "device"),
    }
    rows = [[f"{p}.{k}", _plain(v)] for p, d in parts.items() for k, v in workdir.dotted(d).items()]
    for key in ("device", "commit", "created", "argv", "pid", "host"):
        value = run.run.get(key)
        if value is not None and not isinstance(value, dict):
            rows.append([key, _plain(value)])
    return html.table(["key", "value"], rows, "lw") if rows else ""


def _manifest(run: workdir.Run) -> str:
    manifest = workdir.section(run.run, "manifest")
    domains = workdir.section(manifest, "domains")
    kinds = ("documents", "train_bytes", "heldout_bytes")
    known = {k: v for k, v in domains.items() if isinstance(v, dict)}
    rows = [[name, *(html.count(v.get(k)) for k in kinds)] for name, v in sorted(known.items())]
    rest = {k: v for k, v in manifest.items() if k != "domains" or not known}
    body = ""
    if rest:
        flat = workdir.dotted(rest)
        body = html.table(["key", "value"], [[k, _plain(v)] for k, v in flat.items()], "lw")
    if rows:
        body += html.table(["domain", "documents", "train bytes", "held-out bytes"], rows, "lnnn")
    return body


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
