"""Trains the small models of claims: an arm is compiled once and run at many seeds and rates.

The package's own models, losses, optimizers and data; what `train` has beside (checkpoints,
records, reports) is left out, since a claim runs dozens of models for seconds each. A finished run
is kept as a small file, so that a claim which was stopped goes on.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_pretrain import config, data, nn, optim, shapes
from sparse_pretrain.claims import ngram
from sparse_pretrain.claims.bench import Bench
from sparse_pretrain.data import ngrams
from sparse_pretrain.model import lm
from sparse_pretrain.optim import schedules
from sparse_pretrain.planning import flops
from sparse_pretrain.training import evaluate, replace, state, step

SEQ, BATCH, WIDTH, LAYERS = 128, 16, 64, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Where batches come from. `name` and `facts` are what a kept run is known by.

    `train` gives the endless batches of a seed, `heldout` always the same ones; memories address
    their rows by `tokenizer`.
    """

    name: str
    vocab: int
    train: Callable[[int], Iterator[shapes.Batch]]
    heldout: Callable[[], Iterable[shapes.Batch]]
    facts: dict[str, Any]
    accuracy: bool = False
    tokenizer: Any = None


def text(
    source: str = "python_stdlib", *, tokenizer: str = "bytes", seq: int = SEQ,
    batch: int = BATCH, heldout: int = 32_768, **more: Any,
) -> Task:  # fmt: skip
    """Text by bytes: the Python library's is longer than any run here, so nothing is read twice.

    Units: `heldout` targets of the held-out split, from all over it.
    """
    section = data.Config(source=source, tokenizer=tokenizer, seq=seq, batch=batch, **more)
    opened = data.load(section, seed=0)

    def train(seed: int) -> Iterator[shapes.Batch]:
        return data.load(section, seed=seed).train()

    limit = heldout if opened.tokenizer.is_text else None
    return Task(
        name=source,
        vocab=opened.vocab,
        train=train,
        heldout=lambda: opened.heldout(limit),
        facts={"source": source, "corpus": opened.manifest["hash"], "seq": seq, "batch": batch},
        accuracy=not opened.tokenizer.is_text,
        tokenizer=opened.tokenizer,
    )


def model(
    attention: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None,
    *, width: int = WIDTH, layers: int = LAYERS, conv: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The model section of a small decoder."""
    block = {
        "attention": attention or {"kind": "full", "heads": 2},
        "ffn": ffn or {"kind": "dense", "hidden": 3 * width},
        "conv": conv,
    }
    return {
        "width": width, "blocks": {"block": block}, "pattern": ("block",), "repeats": layers,
        "scan": True, "dtype": "float32",
    } | more  # fmt: skip


MUON = {"kind": "muon", "lr": 0.01}
WSD = {"kind": "wsd", "warmup": 0.05, "decay": 0.4}


class Arm:
    """A model with its optimizer and schedule for `steps` steps of a task."""

    def __init__(
        self, label: str, task: Task, section: dict[str, Any], *, steps: int,
        optimizer: dict[str, Any] = MUON, schedule: dict[str, Any] = WSD, evaluations: int = 1,
    ):  # fmt: skip
        self.label, self.task, self.steps, self.evaluations = label, task, steps, evaluations
        seq, batch = task.facts["seq"], task.facts["batch"]
        values = {
            "name": label, "steps": steps, "model": section | {"vocab": task.vocab},
            "optim": optimizer, "schedule": schedule, "data": {"seq": seq, "batch": batch},
        }  # fmt: skip
        self.experiment = e = config.from_config_dict(values)
        self.content = {
            k: v for k, v in e.to_dict().items() if k in ("model", "optim", "schedule", "steps")
        } | {"task": task.facts, "evaluations": evaluations}
        self.tokens = steps * seq * batch
        self.flops = flops.train_flops_per_token(e.model, seq).model * self.tokens
        self.rate = e.optim.lr
        memory = e.model.memory
        self._addresses = ngrams.addresses(memory, task.tokenizer) if memory.layers else None
        self._programs: tuple[Any, ...] | None = None

    def _compiled(self) -> tuple[Any, ...]:
        if self._programs is None:
            e = self.experiment
            definition = lm.define(e.model)
            # at a peak of 1: the rate is data, so that one program serves all rates
            schedule = schedules.make(
                e.schedule, peak=1.0, total_tokens=self.tokens,
                tokens_per_step=self.tokens // self.steps,
            )  # fmt: skip
            factors = optim.factors(e.optim, e.model, definition, self.tokens)
            tx = optim.TABLE[e.optim.KIND].build(e.optim, definition.dims, schedule, factors)
            init = jax.jit(lambda key: _start(definition, tx, key))
            score = evaluate.Evaluator(definition, (), accuracy=self.task.accuracy)
            self._programs = definition, init, _step(definition, e.model, tx), score
        return self._programs

    def run(
        self, place: Bench, seed: int, *, rate: float | None = None, probe: Callable | None = None
    ) -> dict[str, Any]:
        """One run, or what was kept of it: `loss` held out, `curve`, `train_loss`, `seconds`.

        `probe(definition, params, prices)` may add to it what it finds in the trained model.
        """
        rate = rate or self.rate
        about = {"seed": seed, "rate": rate, "probe": getattr(probe, "__name__", "")}
        content = self.content | about

        def make() -> dict[str, Any]:
            return self._run(seed, rate, probe)

        found = place.kept(f"{self.label}-s{seed}", content, make)
        place.say(
            f"  {self.label} seed {seed} rate {rate:g}: {found['loss']:.4f} nats, "
            f"{found['seconds']:.0f} s"
        )
        return found

    def _carried(self, batches: Iterable[shapes.Batch]) -> Iterator[shapes.Batch]:
        """With the rows that the model's memories read, if it has any."""
        found = self._addresses
        return iter(batches) if found is None else map(found.carried, batches)

    def _run(self, seed: int, rate: float, probe: Callable | None) -> dict[str, Any]:
        began, cpu = time.perf_counter(), time.process_time()
        definition, init, step_, score = self._compiled()
        now, told = init(jax.random.key(seed)), []
        batches = self._carried(self.task.train(seed))
        marks = {round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)}
        curve, scores = [], {}
        for n in range(1, self.steps + 1):
            now, out = step_(now, next(batches), jnp.float32(rate))
            told.append(out)
            if n % 16 == 0:  # the device's queue stays short
                jax.block_until_ready(out)
            if n in marks:
                scores = score(now.params, now.router, self._carried(self.task.heldout()))
                curve.append([n, scores["nats_per_token"]])
        told = jax.device_get(told)
        losses = [float(t["loss"]) for t in told]
        assert math.isfinite(losses[-1]), f"{self.label}: seed {seed} at rate {rate} diverged"
        found: dict[str, Any] = {
            "loss": curve[-1][1],
            "bits_per_byte": scores["bits_per_byte"],
            "curve": curve,
            "train_loss": float(np.mean(losses[-20:])),
            "losses": losses,
            "train_curve": [
                float(np.mean(p)) for p in np.array_split(losses, min(100, len(losses)))
            ],
        }
        if "accuracy" in scores:
            found["accuracy"] = scores["accuracy"]
        if "load" in scores:
            found |= evaluate.balance(scores["load"])
            tail = told[-max(1, self.steps // 10) :]
            found["max_vio_batch"] = float(
                np.mean([np.mean(list(t["vio"].values())) for t in tail])
            )
        if probe is not None:
            found["probe"] = probe(definition, now.params, now.router)
        return found | {
            "flops": self.flops,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "params": sum(int(np.size(x)) for x in jax.tree.leaves(now.params)),
        }


def _start(definition: nn.Definition, tx: Any, key: jax.Array) -> state.TrainState:
    params, prices = definition.init(key)
    zero = jnp.zeros((), jnp.int32)
    return state.TrainState(zero, params, tx.init(params), prices, {}, {}, key)


def _step(definition: nn.Definition, section: lm.Config, tx: Any) -> Callable:
    from sparse_pretrain.games import prices

    def call(now: state.TrainState, batch: shapes.Batch, rate: jax.Array):
        grads, report = step.gradients(definition, now, batch, 1)
        norm = replace.gradient_norm(grads, now.router)
        updates, opt = tx.update(grads, now.opt, now.params, norm=norm)
        # decay is part of the updates, so all of them scale with the rate
        params = jax.tree.map(lambda p, u: p + rate.astype(p.dtype) * u, now.params, updates)
        router = lm.move_prices(section, now.router, report["load"], report["market"])
        out = {
            "loss": report["nats"] / jnp.maximum(jnp.sum(batch.weights), 1.0),
            "vio": {k: jnp.mean(prices.max_violation(v)) for k, v in report["load"].items()},
        }
        return now._replace(step=now.step + 1, params=params, opt=opt, router=router), out

    return jax.jit(call, donate_argnums=0)


def tuned(
    place: Bench, arms: Sequence[Any], grids: Sequence[Sequence[float]], *, seed: int = 100,
    most: int = 4,
) -> tuple[list[float], dict[str, dict[str, float]], bool]:  # fmt: skip
    """(each arm's rate of the lowest held-out loss, every rate's loss, whether all lie inside).

    An arm has a `label` and a `run`. One run a rate, on a seed that no comparison uses. While an
    arm's best is at the edge of its grid, every grid gains a rate, `most` times at most: arms have
    the same number of trials.
    """
    tried = [sorted(grid) for grid in grids]
    for grown in range(most + 1):
        found = [
            {rate: arm.run(place, seed, rate=rate)["loss"] for rate in grid}
            for arm, grid in zip(arms, tried, strict=True)
        ]
        best = [min(losses, key=lambda rate: losses[rate]) for losses in found]
        inside = all(r not in (g[0], g[-1]) for r, g in zip(best, tried, strict=True))
        if inside or grown == most:
            break
        tried = [_wider(grid, rate) for grid, rate in zip(tried, best, strict=True)]
    swept = {
        arm.label: {f"{rate:g}": loss for rate, loss in sorted(losses.items())}
        for arm, losses in zip(arms, found, strict=True)
    }
    return best, swept, inside


def _wider(grid: list[float], best: float) -> list[float]:
    """One more rate, by the grid's own step, at the end that the best one is nearer to."""
    if grid.index(best) < len(grid) // 2:
        return [grid[0] * grid[0] / grid[1], *grid]
    return [*grid, grid[-1] * grid[-1] / grid[-2]]


def count_model(place: Bench, task: Task, steps: int, order: int = 4) -> dict[str, float]:
    """What a model of counts scores from the bytes that an arm reads in `steps`: nats per byte."""

    def make() -> dict[str, Any]:
        began, batches = time.perf_counter(), task.train(0)
        read = np.concatenate([np.ravel(next(batches).targets) for _ in range(steps)])
        rest = [b.targets[b.weights > 0] for b in task.heldout()]
        score = ngram.nats(read, np.concatenate(rest), task.vocab, order)
        return {"nats": score, "flops": 0.0, "seconds": time.perf_counter() - began}

    name = f"{order}-gram-counts"
    found = place.kept(name, {"task": task.facts, "steps": steps, "order": order}, make)
    place.say(f"  {order}-gram Witten-Bell counts: {found['nats']:.4f} nats")
    return {f"{order}-gram Witten-Bell, nats per byte": found["nats"]}


def reached(curve: Sequence[Sequence[float]], loss: float) -> float:
    """The step at which a curve of (step, loss) first is at `loss`, by straight lines; or inf."""
    before: Sequence[float] | None = None
    for row in curve:
        if row[1] <= loss:
            if before is None or before[1] <= row[1]:
                return float(row[0])
            share = (before[1] - loss) / (before[1] - row[1])
            return before[0] + share * (row[0] - before[0])
        before = row
    return math.inf
