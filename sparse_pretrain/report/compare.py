"""One self-contained HTML page for several runs: ranked, overlaid, and paired by seed."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain.report import html, positions, stats, workdir
from sparse_pretrain.report.axes import tokens_axis
from sparse_pretrain.report.charts import SERIES, Chart, numbers, smooth

SHOWN = len(SERIES)  # more curves than colours cannot be told apart
METRIC, ACCURACY = "bits_per_byte", "accuracy"
# Of the experts: a batch's MaxVio at the end of training, and over the held-out text.
BALANCE = {
    "max_vio_batch": "MaxVio batch",
    "max_vio_global": "MaxVio held out",
    "dead_experts": "unused experts",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting and its runs by seed; runs of two arms with equal seeds form a pair."""

    name: str
    runs: dict[int, workdir.Run]

    def values(self, key: str = METRIC) -> dict[int, float]:
        """A final number of each finished run that has it, by seed."""
        found = {seed: run.result(key) for seed, run in self.runs.items()}
        return {
            seed: float(v)
            for seed, v in found.items()
            if self.runs[seed].status == "finished"
            and isinstance(v, (int, float))
            and math.isfinite(v)
        }

    def mean(self, key: str = METRIC) -> float:
        """The mean over seeds; infinite without a finished run, so that the arm ranks last."""
        values = list(self.values(key).values())
        return math.fsum(values) / len(values) if values else math.inf

    @property
    def manifest_hash(self) -> str:
        """The corpora that its runs saw; results compare within one only."""
        return ", ".join(sorted({run.manifest_hash for run in self.runs.values()} - {""}))


@dataclasses.dataclass(frozen=True)
class Difference:
    """`arm` minus `baseline` over the seeds they share; `paired` is None below two pairs."""

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    paired: stats.Paired | None


def rank(arms: Sequence[Arm]) -> list[Arm]:
    """The arms by mean held-out bits/byte, best first, arms without a result last."""
    return sorted(arms, key=lambda arm: (arm.mean(), arm.name))


def differences(arms: Sequence[Arm], *, key: str = METRIC) -> list[Difference]:
    """Each arm against the first, over shared seeds on the same corpus.

    Units: those of `key`; bits/byte unless said otherwise.
    """
    found = []
    for arm in arms[1:]:
        base, own = arms[0].values(key), arm.values(key)
        seeds = tuple(
            seed
            for seed in sorted(set(base) & set(own))
            if arms[0].runs[seed].manifest_hash == arm.runs[seed].manifest_hash
        )
        pair = None
        if len(seeds) >= 2:
            pair = stats.paired([own[s] for s in seeds], [base[s] for s in seeds])
        found.append(Difference(arm.name, arms[0].name, seeds, pair))
    return found


def write_comparison(
    arms: Sequence[Arm],
    path: Path | str,
    title: str = "Comparison",
    *,
    head: str = "",
    tail: str = "",
) -> Path:
    """Write the page to `path` and return it; the first arm is the baseline.

    `head` and `tail` are HTML before the ranking and behind everything.
    Errors: ValueError when there is no arm, or two have one name.
    """
    path = Path(path)
    if not arms:
        raise ValueError("arms: nothing to compare")
    names = [arm.name for arm in arms]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"arms: two are named {twice[0]!r}")
    ranked = rank(arms)
    body = (
        f'<h1>{html.text(title)}</h1><p class="soft">{len(arms)} arms, '
        f"{sum(len(a.runs) for a in arms)} runs</p>"
        + _warning(arms)
        + head
        + html.section("Ranked by held-out bits/byte", _ranking(ranked), id="ranking")
        + html.section("Paired differences", _paired(arms), id="paired")
        + f'<div class="columns">{_curves(ranked)}'
        + positions.compared([list(a.runs.values()) for a in ranked[:SHOWN]])
        + f"{_balance(ranked)}</div>"
        + html.section("By domain, bits/byte", _domains(ranked), id="domains")
        + html.section("What differs", _settings(ranked), id="settings")
        + html.section("Runs", _runs(ranked), id="runs")
        + tail
    )
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(html.page(f"{title}: sparse-pretrain", body), encoding="utf-8")
    os.replace(fresh, path)
    return path


def _warning(arms: Sequence[Arm]) -> str:
    hashes = {run.manifest_hash for arm in arms for run in arm.runs.values()} - {""}
    if len(hashes) < 2:
        return ""
    return (
        '<p class="bad">The runs saw different corpora '
        f"({html.text(', '.join(sorted(hashes)))}): results compare only within one.</p>"
    )


def _swatch(place: int) -> html.Raw:
    if place >= SHOWN:
        return html.Raw("")
    return html.Raw(f'<i class="key" style="background:var(--c{place + 1})"></i>')


def _first(arm: Arm) -> workdir.Run | None:
    return next(iter(arm.runs.values()), None)


def _ranking(ranked: Sequence[Arm]) -> str:
    rows, experts = [], any(arm.values(key) for arm in ranked for key in BALANCE)
    answers = any(arm.values(ACCURACY) for arm in ranked)
    for place, arm in enumerate(ranked):
        values = list(arm.values().values())
        half: Any = None
        if len(values) >= 2:
            _, low, high = stats.interval(values)
            half = html.exact((high - low) / 2, f"± {(high - low) / 2:.4f}")
        run = _first(arm)
        derived = run.derived if run else {}
        rows.append(
            [
                place + 1 if values else "-",
                html.Raw(_swatch(place) + html.text(arm.name)),
                html.number(arm.mean()),
                half,
                f"{len(values)}/{len(arm.runs)}",
                html.count(arm.mean("tokens")),
                html.count(derived.get("active_params")),
                html.count(arm.mean("flops")),
                html.count(arm.mean("tokens_per_second")),
            ]
        )
        if answers:
            rows[-1].append(html.number(arm.mean(ACCURACY), 3))
        if experts:
            rows[-1] += [html.number(arm.mean(key)) for key in BALANCE]
    header = ["", "arm", "bits/byte", "95 %", "finished", "tokens", "active parameters"]
    header += ["FLOPs", "tokens/s", *(["held-out accuracy"] if answers else ())]
    header += BALANCE.values() if experts else ()
    return html.table(header, rows, "nw" + "n" * (len(header) - 2))


def _paired(arms: Sequence[Arm]) -> str:
    found = differences(arms)
    if not any(d.paired for d in found):
        return ""
    rows = []
    for d in found:
        if d.paired is None:
            rows.append([d.arm, "too few pairs", None, None, len(d.seeds)])
            continue
        p = d.paired
        kind = {"lower": "good", "higher": "bad"}.get(p.verdict, "")
        span = html.Raw(f"{html.number(p.low)} to {html.number(p.high)}")
        verdict = html.Raw(f'<span class="{kind}">{p.verdict}</span>')
        rows.append([d.arm, verdict, html.exact(p.mean, f"{p.mean:+.4f}"), span, p.pairs])
    header = ["arm", "verdict", "bits/byte", "95 % interval", "pairs"]
    note = (
        f'<p class="soft">Arm minus baseline ({html.text(arms[0].name)}) at the same seed and '
        "data order, Student-t interval; lower is better, and a tie is an interval that holds "
        "zero.</p>"
    )
    return note + html.table(header, rows, "wlnnn")


def _mean_curve(arm: Arm, kind: str, key: str) -> tuple[np.ndarray, np.ndarray, str] | None:
    """A curve of the arm: the mean over its runs where all have rows."""
    curves = []
    for run in arm.runs.values():
        rows = run.curve if kind == "eval" else run.metrics
        y = numbers(rows, key)
        if np.isfinite(y).any():
            x, unit = tokens_axis(run, rows)
            curves.append((x, smooth(y, max(1, len(y) // 40)) if kind == "metrics" else y))
    if not curves:
        return None
    short = min(len(x) for x, _ in curves)
    stacked = np.stack([y[:short] for _, y in curves])
    return curves[0][0][:short], stacked.mean(0), unit


def _curves(ranked: Sequence[Arm]) -> str:
    boxes = []
    for kind, key, label in (
        ("metrics", "loss", "training loss, nats/token"),
        ("eval", METRIC, "held-out bits/byte"),
        ("eval", ACCURACY, "held-out accuracy"),
    ):
        curves = enumerate(_mean_curve(arm, kind, key) for arm in ranked[:SHOWN])
        drawn = [(i, curve) for i, curve in curves if curve is not None]
        if not drawn:
            continue
        chart = Chart(x=drawn[0][1][2], panels=[label], height=3.0)
        low, high = math.inf, -math.inf
        for i, (x, y, _) in reversed(drawn):
            (chart.points if kind == "eval" else chart.line)(x, y, colour=i)
            tail = y[max(len(y) // 20, min(1, len(y) - 1)) :]
            low, high = min(low, np.nanmin(tail)), max(high, np.nanmax(tail))
        if kind == "metrics" and low < high:
            chart.axes[0].set_ylim(low - 0.05 * (high - low), high)
        note = ""
        if len(ranked) > SHOWN:
            note = f'<p class="soft">The best {SHOWN} of {len(ranked)} arms.</p>'
        name = kind if key != ACCURACY else key
        boxes.append(html.section(label.capitalize(), chart.svg(label) + note, id=f"{name}-curve"))
    return "".join(boxes)


def _balance(ranked: Sequence[Arm]) -> str:
    """Every arm's score against how unevenly it uses its experts."""
    key = "max_vio_global"
    found = [
        (str(rank), a.mean(key), a.mean()) for rank, a in enumerate(ranked, 1) if a.values(key)
    ]
    if len(found) < 2:
        return ""
    chart = Chart(x=f"{BALANCE[key]} (0 is even)", panels=["held-out bits/byte"], height=3.0)
    axes = chart.axes[0]
    for rank, x, y in found:
        chart.points([x], [y], colour=int(rank) - 1)
        axes.annotate(rank, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    if min(x for _, x, _ in found) > 0:
        axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)
    note = '<p class="soft">Numbers are ranks in the table.</p>'
    svg = chart.svg("score against balance")
    return html.section("Score against balance", svg + note, id="balance")


def _domains(ranked: Sequence[Arm]) -> str:
    columns: dict[str, None] = {}
    rows = []
    for arm in ranked:
        per = [workdir.section(run.summary, "per_domain") for run in arm.runs.values()]
        values: dict[str, list[float]] = {}
        for found in per:
            for domain, row in found.items():
                value = row.get(METRIC) if isinstance(row, dict) else None
                if isinstance(value, (int, float)):
                    values.setdefault(domain, []).append(value)
        columns |= dict.fromkeys(values)
        rows.append((arm.name, {d: math.fsum(v) / len(v) for d, v in values.items()}))
    if not columns:
        return ""
    body = [[name, *(html.number(means.get(d)) for d in columns)] for name, means in rows]
    return html.table(["arm", *columns], body, "w" + "n" * len(columns))


def _settings(ranked: Sequence[Arm]) -> str:
    """The config keys on which the arms disagree, seeds left out."""
    flat = [(a.name, workdir.dotted(r.config)) for a in ranked if (r := _first(a)) and r.config]
    if len(flat) < 2:
        return ""
    keys = sorted({k for _, c in flat for k in c} - {"seed", "name"})
    keys = [k for k in keys if len({repr(c.get(k)) for _, c in flat}) > 1]
    if not keys:
        return ""
    return html.table(["arm", *keys], [[n, *(c.get(k) for k in keys)] for n, c in flat])


def _runs(ranked: Sequence[Arm]) -> str:
    rows = []
    for arm in ranked:
        for seed, run in sorted(arm.runs.items()):
            kind = {"finished": "good", "failed": "bad"}.get(run.status, "")
            status = html.Raw(f'<span class="{kind}">{html.text(run.status)}</span>')
            bits = html.number(run.result(METRIC))
            rows.append([arm.name, seed, status, bits, run.path.name, run.cause])
    return html.table(["arm", "seed", "status", "bits/byte", "workdir", "cause"], rows, "wnlnww")
