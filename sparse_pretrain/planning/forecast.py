"""The best model, data, batch and plan for a budget, by a published law of the loss."""

import dataclasses
import math
import re
from typing import Any

from sparse_pretrain import config as configs
from sparse_pretrain.planning import chips, cost, flops, planner, summary


@dataclasses.dataclass(frozen=True)
class Law:
    """Nats per token of N parameters after D tokens: E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    smallest: float
    largest: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


# Fitted to 240 dense models of 44M to 16B parameters on MassiveText, tokens of SentencePiece 32k
CHINCHILLA = Law(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658, 44e6, 16e9,
    "2404.10102, the refit of Chinchilla: dense models of 44M to 16B parameters on MassiveText",
)  # fmt: skip
# width x layers: about 1:64 to 1:128, as the models the law was fitted to
LADDER = (
    "256x4", "384x6", "512x8", "640x10", "768x12", "1024x12", "1024x16", "1280x16", "1536x18",
    "1792x20", "2048x24", "2560x26", "3072x28", "4096x32", "5120x40", "6144x48", "8192x80",
)  # fmt: skip
LENGTH, VOCAB, HOUR = 2048, 32768, 3600.0


def spend(budget: str, fleet: chips.Fleet, price: float | None) -> dict[str, Any]:
    """The rung of the ladder with the least forecast loss, and what the others would reach.

    `budget` is `1000usd` or `8h`, of wall time on the whole fleet.
    Errors: ValueError naming what is no budget, or the price that is missing.
    """
    hours = chip_hours(budget, fleet, price)
    rows = [row for row in (_rung(size, fleet, hours) for size in LADDER) if row]
    if not rows:
        raise ValueError(
            f"--budget: {budget} on {fleet.count} x {fleet.chip.name} trains no model of the "
            f"ladder: even llama:{LADDER[0]} does not fit or has no step in {hours:.3g} chip-hours"
        )
    best = min(rows, key=lambda row: row["loss"])
    price = fleet.chip.price if price is None else price
    near = [row for row in rows if row["loss"] < best["loss"] + 0.01]
    return best | {
        "budget": budget,
        "chip": fleet.chip.name,
        "chips": fleet.count,
        "chip_hours": hours,
        "days": hours / fleet.count / 24,
        "dollars": hours * price if price else None,
        "law": CHINCHILLA.source,
        "inside_law": CHINCHILLA.smallest <= best["parameters"] <= CHINCHILLA.largest,
        "as_good": [row["config"] for row in near],
        "ladder": rows,
    }


def chip_hours(budget: str, fleet: chips.Fleet, price: float | None) -> float:
    """Chip-hours that a budget buys."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)(usd|h)", budget.strip().lower())
    if found is None or not 0 < float(found[1]) < 1e15:
        raise ValueError(f"--budget: {budget!r} is neither 1000usd nor 8h")
    amount = float(found[1])
    if found[2] == "h":
        return amount * fleet.count
    price = fleet.chip.price if price is None else price
    if not price:
        raise ValueError(f"--price: none is known of {fleet.chip.name}; give dollars a chip-hour")
    return amount / price


def _rung(size: str, fleet: chips.Fleet, hours: float) -> dict[str, Any] | None:
    """A model of the ladder trained for so many chip-hours; None where it does not fit."""
    experiment = configs.resolve(f"llama:{size}")
    model = dataclasses.replace(experiment.model, vocab=VOCAB)
    counts = flops.parameters(model)
    seconds = hours / fleet.count * HOUR
    # tokens decide the batch and the batch hardly the tokens: two rounds settle it
    tokens, found = 20.0 * counts.total, None
    for _ in range(2):
        rows = batch_rows(6.0 * counts.total * tokens, fleet.count)
        data = dataclasses.replace(experiment.data, seq=LENGTH, batch=rows)
        tried = dataclasses.replace(experiment, model=model, data=data, steps=1, tokens=0)
        made = planner.Planner(planner.Problem(tried, fleet))
        ranked = made.candidates()
        if not ranked or not made.fits(ranked[0]):
            return None
        found = ranked[0]
        tokens = seconds / found.step.total * rows * LENGTH
    assert found is not None
    if tokens < 2 * rows * LENGTH:
        return None
    return {
        "config": f"llama:{size}",
        "parameters": counts.total,
        "tokens": tokens,
        "batch": rows,
        "seq": LENGTH,
        "lr": learning_rate(6.0 * counts.total * tokens),
        "plan": found.plan,
        "mesh": found.mesh,
        "accumulate": found.micro,
        "remat": found.remat,
        "step_seconds": found.step.total,
        "memory_per_chip_bytes": round(found.memory_per_chip),
        "flops_per_token": made.work.flops,
        "bound_by": found.step.bound_by,
        "loss": CHINCHILLA.loss(counts.total, tokens),
    }


def batch_rows(compute: float, count: int) -> int:
    """Rows of a batch: DeepSeek LLM's best batch at this compute, a power of two over the chips.

    Source: 2401.02954, equation 1: 0.2920 C^0.3271 tokens.
    """
    rows = 0.2920 * compute**0.3271 / LENGTH
    return max(count, 2 ** max(round(math.log2(max(rows, 1))), 0))


def learning_rate(compute: float) -> float:
    """DeepSeek LLM's best peak rate at this compute: 0.3118 C^-0.1250 (2401.02954, equation 1)."""
    return 0.3118 * compute**-0.1250


def sentences(told: dict[str, Any]) -> str:
    """What to train, and how sure that is."""
    t = told
    money = f", ${t['dollars']:,.0f}" if t["dollars"] else ""
    mesh = f" --mesh={t['mesh']}" if t["mesh"] else ""
    low, high = (t["tokens"] / cost.SPREAD, t["tokens"] * cost.SPREAD)
    inside = "within" if t["inside_law"] else "OUTSIDE"
    lines = [
        f"{t['chip_hours']:,.4g} chip-hours of {t['chips']} x {t['chip']} ({t['days']:.3g} days"
        f"{money}) train best a model of {summary._short(t['parameters'])} parameters, "
        f"{t['config']}, on {summary._short(t['tokens'])} tokens ({summary._short(low)} to "
        f"{summary._short(high)}, as steps take).",
        f"The forecast is {t['loss']:.3f} nats a token, by {t['law']}; this model is {inside} that "
        "range. The law knows neither your text nor experts: take its order of models, not its "
        "number.",
        f"Within 0.01 of that are {', '.join(t['as_good'])}.",
        f"Its step of {t['batch']} rows of {t['seq']} takes {t['step_seconds']:.3g} s under "
        f"{t['plan']}, bound by {t['bound_by']}.",
        f"To train it: sparse-pretrain train --config={t['config']} --plan={t['plan']}{mesh} "
        f"--config.tokens={t['tokens']:.0f} --config.data.seq={t['seq']} "
        f"--config.data.batch={t['batch']} --config.accumulate={t['accumulate']} "
        f"--config.model.remat={t['remat']} --config.optim.lr={t['lr']:.2g}",
    ]
    return "\n".join(lines)
