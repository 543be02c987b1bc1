"""What placing experts would have done for a run: numbers per policy, a table, and a page."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sparse_pretrain.report import charts, html, workdir
from sparse_pretrain.sharding import policies
from sparse_pretrain.training.progress import si

BASELINE = "none"
ASSUMED_SHARE = 0.5  # of a step, where a run does not say what its experts cost
PASS = 3  # forward and backward products over forward ones, as in planning.flops
STRAIGHT, DASHED = "-", "--"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run's experts cost. Units: `share` of the step's FLOPs; bytes of one expert.

    `weight_bytes` are sent in the model's dtype. `state_bytes` are its float32 master weights and
    optimizer moments. None where the run does not say.
    """

    share: float | None
    weight_bytes: int | None
    state_bytes: int | None


def costs(run: workdir.Run) -> Costs:
    """The costs of a run's routed experts, from its configuration and derived numbers."""
    try:
        model = run.config["model"]
        names = [*model["prefix"], *list(model["pattern"]) * model["repeats"]]
        found = [model["blocks"][name]["ffn"] for name in names]
        experts = [ffn for ffn in found if ffn["kind"] == "moe"]
        sizes = [3 * model["width"] * ffn["hidden"] for ffn in experts]  # gate, up, down
        flops = PASS * sum(2 * n * f["top_k"] for n, f in zip(sizes, experts, strict=True))
        size = max(sizes)
        width = 4 if model["dtype"] == "float32" else 2
        moments = 1 if run.config["optim"]["kind"] == "muon" else 2
    except (KeyError, TypeError, ValueError):
        return Costs(None, None, None)
    step = run.derived.get("train_flops_per_token")
    share = flops / step if isinstance(step, (int, float)) and step >= flops > 0 else None
    return Costs(share, width * size, 4 * (1 + moments) * size)


def groups(run: workdir.Run) -> int:
    """The groups of experts that the run's router limits tokens to; 1 where it has none."""
    found = [
        ffn["router"].get("groups", 1)
        for block in workdir.section(run.config.get("model") or {}, "blocks").values()
        if isinstance(ffn := (block or {}).get("ffn"), dict) and ffn.get("kind") == "moe"
    ]
    return int(found[0]) if found and isinstance(found[0], int) else 1


def summary(
    replays: Mapping[str, policies.Replay],
    setting: policies.Setting,
    *,
    share: float,
    weight_bytes: int | None = None,
    state_bytes: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The numbers of every policy, as JSON data; gains are over the policy `none`.

    Units: bytes over all layers; `planning_ms` of this host per batch and layer; `simulated_gain`
    in steps/s, 0.1 is 10 %.
    """
    before = replays[BASELINE]
    layers = before.load.shape[1]
    rows = {}
    for name, r in replays.items():
        places = len(r.moved)
        moved = r.moved.sum() / places if places else 0.0
        homes = r.rehomed.sum() / places if places else 0.0
        fetched = r.fetched.sum() / len(r.fetched)
        rows[name] = {
            "what": policies.TABLE[name].what,
            "max_over_mean": r.expert_time,
            "worst": float(r.ratio.max()),
            "simulated_gain": policies.step_gain(before, r, share),
            "replacements": places,
            "moved_experts": moved,
            "moved_weight_bytes": None if weight_bytes is None else moved * weight_bytes,
            "moved_state_bytes": None if state_bytes is None else homes * state_bytes,
            "fetched_experts_per_step": fetched,
            "fetched_bytes_per_step": None if weight_bytes is None else fetched * weight_bytes,
            "overflow_pairs": int(r.overflow.sum()),
            "experts_per_device": r.slots,
            "most_fetched_per_device": r.prefetch,
            "planning_ms": 1000 * r.seconds / (len(r.load) * layers),
        }
        if r.bound is not None:
            rows[name]["placement_bound"] = float(r.bound.mean())
    return rows


HEADER = ("policy", "max/mean", "worst", "steps/s", "moved", "+ state", "fetched", "slots")
NOTES = (
    "max/mean: load of the busiest device over the mean, mean and worst over the scored steps and "
    "layers. steps/s: simulated against `none`; experts take the time of the busiest device, the "
    "rest of the step is as it was, and moving and fetching cost nothing. moved: weights per "
    "re-placement, + state: optimizer state and master weights of experts that change their home. "
    "fetched: weights copied for one batch, whose gradients come back the same way (not "
    "counted). slots: experts a device keeps, + the most it fetched at once."
)


def cells(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of policies as text, in the columns of HEADER."""

    def size(value):
        return "-" if not value else si(value) + "B"

    return [
        (
            name,
            f"{row['max_over_mean']:.3f}",
            f"{row['worst']:.3f}",
            f"{100 * row['simulated_gain']:+.1f} %",
            size(row["moved_weight_bytes"]),
            size(row["moved_state_bytes"]),
            size(row["fetched_bytes_per_step"]),
            f"{row['experts_per_device']}"
            + (f" + {row['most_fetched_per_device']}" if row["most_fetched_per_device"] else ""),
        )
        for name, row in rows.items()
    ]


def page(
    record: Mapping[str, Any],
    replays: Mapping[str, policies.Replay],
    load: Int[np.ndarray, "T N E"],
) -> str:
    """The whole HTML page: headline, table, imbalance over time, devices before and after."""
    rows = record["policies"]
    best = min(rows, key=lambda name: rows[name]["max_over_mean"])
    title = f"{record['name']}: experts on {record['devices']} devices"
    head = (
        f"<h1>{html.text(title)}</h1>"
        f'<p class="soft">{html.text(record["trace"])} · {record["steps"]} recorded steps of '
        f"{record['layers']} layers with {record['experts']} experts · placed by "
        f"{record['window']} steps, scored on the next · experts are "
        f"{100 * record['expert_share']:.0f} % of a step ({html.text(record['share_is'])})</p>"
    )
    cards = [
        ("before", "max/mean load in order", html.number(rows[BASELINE]["max_over_mean"], 3)),
        ("best", f"max/mean with {best}", html.number(rows[best]["max_over_mean"], 3)),
        (
            "gain",
            f"steps/s with {best}, simulated",
            html.exact(
                rows[best]["simulated_gain"], f"{100 * rows[best]['simulated_gain']:+.1f} %"
            ),
        ),
    ]
    top = f'<div class="cards" id="headline">{"".join(html.card(*c) for c in cards)}</div>'
    table = str(html.table(HEADER, cells(rows), "lnnnnnnn"))
    table += f'<p class="soft">{html.text(NOTES)}</p>'
    boxes = [
        html.section("Imbalance over time", _over_time(replays, record["window"]), id="time"),
        html.section("Experts' load", charts.heatmap(_mean(load), "Expert load"), id="experts"),
        html.section("Devices before and after", _devices(replays, best), id="devices"),
    ]
    whats = html.table(["policy", "what it does"], [[n, r["what"]] for n, r in rows.items()], "lw")
    return html.page(
        title,
        head
        + top
        + html.section("Policies", table, id="policies")
        + f'<div class="columns">{"".join(boxes)}</div>'
        + html.folded("What the policies do", whats, id="what"),
    )


def _mean(load_TxNxE):
    return load_TxNxE.mean(0).astype(np.float64)


def _over_time(replays: Mapping[str, policies.Replay], window: int) -> str:
    chart = charts.Chart(x="recorded step", panels=["max/mean load"], height=3.4)
    for i, (name, r) in enumerate(replays.items()):
        y = r.ratio.mean(1)
        style = STRAIGHT if i < len(charts.SERIES) else DASHED
        chart.line(window + np.arange(len(y)), y, colour=i, label=name, linestyle=style)
    return chart.svg("Imbalance over time") + '<p class="soft">Mean of the layers.</p>'


def _devices(replays: Mapping[str, policies.Replay], best: str) -> str:
    before = replays[BASELINE]
    look = int(before.ratio.max(1).argmax())
    body = '<p class="soft">Load of each device over the mean, at the worst look before.</p>'
    for label, r in ((BASELINE, before), (best, replays[best])):
        figure = charts.heatmap(r.load[look].astype(np.float64), f"Devices, {label}", x="device")
        body += f"<p>{html.text(label)}</p>{figure}"
        if best == BASELINE:
            break
    return body


def write(path: Path, text: str) -> Path:
    """Write the page; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
