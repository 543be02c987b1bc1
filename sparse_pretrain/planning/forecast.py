"""The best model, data, batch and plan for a budget, by a law of loss that was fitted to runs."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparse_pretrain import config as configs
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, cost, flops, planner, summary
from sparse_pretrain.scaling import forecast as loss_of
from sparse_pretrain.scaling.fit import accuracy, hyper, record


@dataclasses.dataclass(frozen=True)
class Rung:
    """A model that a budget may go to: what `--config` takes, its overrides, and what they give.

    `own` says that batch and peak rate are the experiment's, as in the runs its law was fitted to.
    """

    config: str
    experiment: configs.Experiment
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: bool = False


DEFAULT = "chinchilla"  # of the fits that ship
# width x layers: about 1:64 to 1:128, as the models the law was fitted to
LADDER = (
    "256x4", "384x6", "512x8", "640x10", "768x12", "1024x12", "1024x16", "1280x16", "1536x18",
    "1792x20", "2048x24", "2560x26", "3072x28", "4096x32", "5120x40", "6144x48", "8192x80",
)  # fmt: skip
LENGTH, VOCAB, HOUR = 2048, 32768, 3600.0
NEAR = 0.01  # nats: models that the law cannot tell from the best
# where the user's own sweep gives none
BATCH, RATE = hyper.DEEPSEEK["batch"], hyper.DEEPSEEK["lr"]


def ladder() -> Iterator[Rung]:
    """Dense Llamas, smallest first."""
    for size in LADDER:
        experiment = configs.resolve(f"llama:{size}")
        model = dataclasses.replace(experiment.model, vocab=VOCAB)
        data = dataclasses.replace(experiment.data, seq=LENGTH)
        yield Rung(f"llama:{size}", dataclasses.replace(experiment, model=model, data=data))


def spend(
    budget: str,
    fleet: chips.Fleet,
    price: float | None,
    *,
    fit: record.Fit | None = None,
    rungs: Iterable[Rung] | None = None,
    laws: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The rung with the least forecast loss, and what the others would reach.

    `budget` is `1000usd` or `8h`, of wall time on the whole fleet; `fit` gives the loss (by default
    the shipped one of Chinchilla), `rungs` the models (the ladder), and `laws` of `lr` and `batch`
    what `scaling.fit.settings` fitted.
    Errors: ValueError naming what is no budget, or the price that is missing.
    """
    hours = chip_hours(budget, fleet, price)
    fit = fit or loss_of.read(DEFAULT)
    spending = _Spending(fleet, hours, fit, laws or {})
    tried = list(rungs if rungs is not None else ladder())
    rows = [row for row in map(spending.on, tried) if row]
    if not rows:
        raise ValueError(
            f"--budget: {budget} on {fleet.count} x {fleet.chip.name} trains no model of the "
            f"{len(tried)} tried: even {tried[0].config} does not fit or has no step in "
            f"{hours:.3g} chip-hours"
        )
    best = min(rows, key=lambda row: row["loss"])
    price = fleet.chip.price if price is None else price
    return best | {
        "budget": budget,
        "chip": fleet.chip.name,
        "chips": fleet.count,
        "chip_hours": hours,
        "days": hours / fleet.count / 24,
        "dollars": hours * price if price else None,
        "law": fit.provenance["data"],
        "law_span": {k: list(v) for k, v in fit.span.items()},
        "as_good": [_called(row) for row in rows if row["loss"] < best["loss"] + NEAR],
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


class _Spending:
    """So many chip-hours on a fleet, forecast by one fit."""

    def __init__(self, fleet: chips.Fleet, hours: float, fit: record.Fit, laws: Mapping[str, Any]):
        self.fleet, self.hours, self.fit, self.laws = fleet, hours, fit, laws

    def on(self, rung: Rung) -> dict[str, Any] | None:
        """A model trained for all the hours; None where it does not fit."""
        experiment, model = rung.experiment, rung.experiment.model
        definition = lm.define(model)
        seconds, length = self.hours / self.fleet.count * HOUR, experiment.data.seq
        work = flops.train_flops_per_token(model, length).model
        # tokens decide the batch and the batch hardly the tokens: two rounds settle it
        tokens, found = 20.0 * work / 6, None
        for _ in range(1 if rung.own and "batch" not in self.laws else 2):
            rows = self._rows(rung, work, tokens)
            data = dataclasses.replace(experiment.data, batch=rows)
            tried = dataclasses.replace(experiment, data=data, steps=1, tokens=0)
            made = planner.Planner(planner.Problem(tried, self.fleet), definition)
            ranked = made.candidates()
            if not ranked or not made.fits(ranked[0]):
                return None
            found = ranked[0]
            tokens = seconds / found.step.total * rows * length
        assert found is not None
        if tokens < 2 * rows * length:
            return None
        said = loss_of.of_config(self.fit, tried, tokens)
        kept = ("loss", "interval", "half_width", "validity", "accuracy")
        return {
            "config": rung.config,
            "overrides": dict(rung.overrides),
            "parameters": flops.parameters(model, definition).total,
            "params": said["params"],
            "tokens": tokens,
            "batch": rows,
            "seq": length,
            "lr": self._rate(rung, work, tokens),
            "plan": found.plan,
            "mesh": found.mesh,
            "accumulate": found.micro,
            "remat": found.remat,
            "step_seconds": found.step.total,
            "memory_per_chip_bytes": round(found.memory_per_chip),
            "flops_per_token": made.work.flops,
            "bound_by": found.step.bound_by,
            **{key: said[key] for key in kept},
        }

    def _rows(self, rung: Rung, work: float, tokens: float) -> int:
        """Rows of a batch, a power of two over the chips, where a law gives the tokens."""
        if rung.own and "batch" not in self.laws:
            return rung.experiment.data.batch
        law = self.laws.get("batch", {}).get("constants", BATCH)
        wanted = hyper.evaluate(law, params=work / 6, tokens=tokens, flops=work * tokens)
        rows = wanted / rung.experiment.data.seq
        return max(self.fleet.count, 2 ** max(round(math.log2(max(rows, 1))), 0))

    def _rate(self, rung: Rung, work: float, tokens: float) -> float:
        """The peak rate."""
        if rung.own and "lr" not in self.laws:
            return rung.experiment.optim.lr
        law = self.laws.get("lr", {}).get("constants", RATE)
        return hyper.evaluate(law, params=work / 6, tokens=tokens, flops=work * tokens)


def _called(row: Mapping[str, Any]) -> str:
    width = row["overrides"].get("model.width")
    return f"{row['config']} at width {width}" if width else str(row["config"])


def said(row: Mapping[str, Any], law: str) -> list[str]:
    """A forecast loss in words, what it says of tasks, and where both are known to hold.

    Where nothing supports the law there is no number: a hundredth of its sizes is off by nats.
    """
    if row["validity"].startswith(accuracy.OUTSIDE):
        return [
            f"No loss is forecast: {row['validity']}, by the law of {law}; --fit names another."
        ]
    low, high = row["interval"]
    return [
        f"The forecast is {row['loss']:.3f} nats a token [{low:.3f}, {high:.3f}], "
        f"{row['validity']}; by the law of {law}. Of other text, tokens or kinds of model take its "
        "order, not its number.",
        "Accuracy: " + "; ".join(accuracy.sentence(told) for told in row["accuracy"]) + ".",
    ]


def sentences(told: dict[str, Any]) -> str:
    """What to train, and how sure that is."""
    t = told
    money = f", ${summary.amount(t['dollars'])}" if t["dollars"] else ""
    mesh = f" --mesh={t['mesh']}" if t["mesh"] else ""
    low, high = (t["tokens"] / cost.SPREAD, t["tokens"] * cost.SPREAD)
    flags = "".join(f" --config.{key}={value}" for key, value in t["overrides"].items())
    lines = [
        f"{t['chip_hours']:,.4g} chip-hours of {t['chips']} x {t['chip']} ({t['days']:.3g} days"
        f"{money}) train best a model of {summary._short(t['parameters'])} parameters, "
        f"{_called(t)}, on {summary._short(t['tokens'])} tokens ({summary._short(low)} to "
        f"{summary._short(high)}, as steps take).",
        *said(t, t["law"]),
        f"By the law {', '.join(t['as_good'])} are within {NEAR} nats of the best.",
        f"Its step of {t['batch']} rows of {t['seq']} takes {t['step_seconds']:.3g} s under "
        f"{t['plan']}, bound by {t['bound_by']}.",
        f"To train it: sparse-pretrain train --config={t['config']}{flags} --plan={t['plan']}"
        f"{mesh} --config.tokens={t['tokens']:.0f} --config.data.seq={t['seq']} "
        f"--config.data.batch={t['batch']} --config.accumulate={t['accumulate']} "
        f"--config.model.remat={t['remat']} --config.optim.lr={t['lr']:.2g}",
    ]
    return "\n".join(lines)
