"""What a plan says, for programs and in sentences."""

from collections.abc import Sequence
from typing import Any

from sparse_pretrain.planning import cost, flops, network
from sparse_pretrain.planning.planner import Candidate, Planner

HOUR, DAY, GIGA, TERA = 3600.0, 24.0, 1e9, 1e12
SHOWN = 5


def of(
    planner: Planner,
    ranked: Sequence[Candidate],
    *,
    tokens: float | None,
    price: float | None,
    config: str,
) -> dict[str, Any]:
    """Everything about the best candidate, and the best of each plan behind it.

    Units: `tokens` to train on, None for the configuration's; `price` dollars a chip-hour, None
    for the table's.
    """
    best, problem = ranked[0], planner.problem
    chip, count = problem.fleet.chip, problem.fleet.count
    experiment = problem.experiment
    per_step = experiment.tokens_per_step
    total = tokens or experiment.steps_of(0) * per_step or None
    counts = flops.parameters(planner.model, planner.definition)
    price = chip.price if price is None else price

    def hours(candidate: Candidate) -> float | None:
        return candidate.step.total * total / per_step * count / HOUR if total else None

    spent = hours(best)
    told: dict[str, Any] = {
        "config": config,
        "name": experiment.name,
        "chip": chip.name,
        "chips": count,
        "precision": problem.precision,
        "tokens": total,
        "plan": best.plan,
        "mesh": best.mesh,
        "accumulate": best.micro,
        "remat": best.remat,
        "pipeline": problem.pipeline(best.sizes) if best.sizes.get("pipe", 1) > 1 else None,
        "chip_hours": spent,
        "chip_hours_low": spent and spent / cost.SPREAD,
        "chip_hours_high": spent and spent * cost.SPREAD,
        "days": spent and spent / count / DAY,
        "dollars": spent * price if spent and price else None,
        "price": price or None,
        "energy_kwh": spent * chip.watts / 1e3 if spent and chip.watts else None,
        "step_seconds": best.step.total,
        "tokens_per_second": per_step / best.step.total,
        "memory_per_chip_bytes": round(best.memory_per_chip),
        "memory_bytes": {k: round(v) for k, v in best.memory.items()},
        "host_bytes_per_chip": round(best.host),
        "flops_per_token": planner.work.flops,
        "model_flops_per_token": flops.train_flops_per_token(planner.model, planner.length).model,
        "total_params": counts.total,
        "active_params": counts.active,
        "bound_by": best.step.bound_by,
        "seconds": {k: getattr(best.step, k) for k in best.step._fields},
        "communication": [
            {
                "axis": m.axis,
                "what": m.what,
                "bytes": round(m.size),
                "seconds": network.seconds(m, chip, best.sizes),
            }
            for m in best.messages
        ],
        "ranked": [_row(c, hours(c)) for c in _best_of_each(planner, ranked)[:SHOWN]],
    }
    return told


def _row(candidate: Candidate, hours: float | None) -> dict[str, Any]:
    return {
        "plan": candidate.plan,
        "mesh": candidate.mesh,
        "micro_batches": candidate.micro,
        "remat": candidate.remat,
        "memory_per_chip_bytes": round(candidate.memory_per_chip),
        "step_seconds": candidate.step.total,
        "chip_hours": hours or 0.0,
        "bound_by": candidate.step.bound_by,
    }


def _best_of_each(planner: Planner, ranked: Sequence[Candidate]) -> list[Candidate]:
    seen: dict[str, Candidate] = {}
    for candidate in ranked:
        if planner.fits(candidate):
            seen.setdefault(candidate.plan, candidate)
    return list(seen.values())


def headline(told: dict[str, Any]) -> str:
    """The model and what it is to run on, in one line."""
    count = told["tokens"]
    tokens = f"{_short(count)} tokens" if count else "an epoch, of unknown length,"
    return (
        f"{told['name']}: {_short(told['total_params'])} parameters, "
        f"{_short(told['active_params'])} active, {_short(told['model_flops_per_token'])} FLOPs a "
        f"token; {tokens} on {told['chips']} x {told['chip']}, products in {told['precision']}"
    )


def _short(n: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.4g}{letter}"
    return f"{n:.4g}"


def _time(days: float) -> str:
    for unit, each in (("days", 1.0), ("hours", DAY), ("minutes", DAY * 60)):
        if days * each >= 1:
            return f"{days * each:.3g} {unit}"
    return f"{days * DAY * HOUR:.3g} seconds"


def amount(n: float) -> str:
    """A whole number with commas from 100 on, three digits below: a small run's cost is not 0."""
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def energy(kwh: float) -> str:
    """In the unit that leaves a number one can read."""
    return f"{amount(kwh / 1e3)} MWh" if kwh >= 1e4 else f"{amount(kwh)} kWh"


def sentences(told: dict[str, Any]) -> list[str]:
    """Why this plan, what it costs, what bounds it, how to start it."""
    t = told
    out = []
    if t["chip_hours"]:
        days = _time(t["days"])
        money = f", ${amount(t['dollars'])} at ${t['price']:g} an hour" if t["dollars"] else ""
        power = f", {energy(t['energy_kwh'])} at the chips" if t["energy_kwh"] else ""
        low, high = amount(t["chip_hours_low"]), amount(t["chip_hours_high"])
        out.append(
            f"{t['plan']} takes {days}: {amount(t['chip_hours'])} chip-hours ({low} to {high} for "
            f"four of five runs){money}{power}."
        )
    parts = {k: v for k, v in t["seconds"].items() if k != "hidden" and v > 0}
    shares = ", ".join(
        f"{k} {v / t['step_seconds']:.0%}"
        for k, v in sorted(parts.items(), key=lambda p: -p[1])
        if v / t["step_seconds"] >= 0.005
    )
    out.append(f"A step of {t['step_seconds']:.3g} s is bound by {t['bound_by']}: {shares}.")
    if t["pipeline"]:
        out.append(
            f"Its stages take turns by {t['pipeline']} and wait {t['seconds']['bubble']:.3g} s; "
            "they keep the inputs of a forward pass alone, and do it again."
        )
    memory = ", ".join(f"{k} {v / GIGA:.2f}" for k, v in t["memory_bytes"].items())
    out.append(f"Each chip holds {t['memory_per_chip_bytes'] / GIGA:.1f} GB: {memory}.")
    if t["host_bytes_per_chip"]:
        host = t["host_bytes_per_chip"] / GIGA
        out.append(f"Its host keeps {host:.2f} GB for it, which cross their link twice a step.")
    for m in t["communication"]:
        out.append(
            f"Over {m['axis']}, a chip receives {m['bytes'] / GIGA:.3g} GB of {m['what']} a step, "
            f"{m['seconds']:.3g} s of its links."
        )
    if t["communication"]:
        hidden, shown = t["seconds"]["hidden"], t["seconds"]["exchange"]
        busy = sum(t["seconds"][k] for k in ("products", "attention", "traffic"))
        out.append(
            f"Of that {hidden:.3g} s are taken to hide behind the {busy:.3g} s of computing, all "
            f"that can, and {shown:.3g} do not."
        )
    out += _why(t)
    if "compiled" in t:
        out.append(_compiled(t))
    mesh = f" --mesh={t['mesh']}" if t["mesh"] else ""
    config = f" --config={t['config']}" if t["config"] else ""
    out.append(
        f"To train so: sparse-pretrain train{config} --plan={t['plan']}{mesh} "
        f"--config.accumulate={t['accumulate']} --config.model.remat={t['remat']}"
        + (f" --pipeline={t['pipeline']}" if t["pipeline"] else "")
    )
    return out


def _why(t: dict[str, Any]) -> list[str]:
    """What the next plan loses by."""
    if len(t["ranked"]) < 2:
        return []
    first, second = t["ranked"][:2]
    slower = second["step_seconds"] / first["step_seconds"] - 1
    pace = f"{slower:.1%} slower" if slower >= 5e-4 else "as fast"
    mesh = f" ({second['mesh']})" if second["mesh"] else ""
    return [
        f"The next, {second['plan']}{mesh}, is {pace}: it is bound by "
        f"{second['bound_by']} and holds {second['memory_per_chip_bytes'] / GIGA:.1f} GB."
    ]


def _compiled(t: dict[str, Any]) -> str:
    c = t["compiled"]
    kinds = ", ".join(
        f"{v['count']} {k} of {v['bytes'] / GIGA:.3g} GB" for k, v in c["collectives"].items()
    )
    off = t["memory_per_chip_bytes"] / c["memory_per_chip_bytes"] - 1
    held, state, rest = (
        f"{c[k] / GIGA:.1f}"
        for k in ("memory_per_chip_bytes", "arguments_bytes", "temporary_bytes")
    )
    verdict = "fits" if c["fits"] else "does NOT fit"
    return (
        f"The compiler, after {c['seconds']:.0f} s, says {held} GB a chip ({state} of state, "
        f"{rest} temporary), which {verdict}; the estimate is {off:+.0%} off. A step runs "
        f"{c['flops'] / TERA:.4g} TFLOP of products on each{_open(c)}; collectives: "
        f"{kinds or 'none'}."
    )


def _open(c: dict[str, Any]) -> str:
    """What the count of products leaves open."""
    loops, kernels = c["open_loops"], c["kernels"]
    parts = [f"{loops} loops over what the data decides taken once"] if loops else []
    parts += [f"{kernels} calls of kernels left out"] if kernels else []
    return f" ({', '.join(parts)})" if parts else ""
