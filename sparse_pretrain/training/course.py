"""What a run's phases run: the compiled step and the evaluation of each, made when it begins."""

import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from sparse_pretrain import nn, phases
from sparse_pretrain.model import lm
from sparse_pretrain.sharding import peers
from sparse_pretrain.training import credit, evaluate, record, run, step


class Course:
    """The stage of every step, and what is built for it; equal stages share what they can.

    A step's stage follows from its number alone, so a resumed run takes the same ones.
    """

    def __init__(self, prepared: run.Prepared, record: record.Record):
        self._p, self._record = prepared, record
        self._definitions: list[tuple[Any, nn.Definition]] = [
            (prepared.experiment.model, prepared.definition)
        ]
        self._steps: list[tuple[Any, Any]] = []
        self._evaluators: list[tuple[Any, evaluate.Evaluator]] = []
        self._creditors: list[tuple[Any, credit.Creditor]] = []
        self._targets: list[Any] = []  # of credits
        self._flops = [row["train_flops_per_token"] for row in prepared.derived.get("phases", [])]

    def stage(self, n: int) -> phases.Stage:
        """The stage of step `n`, of which 1 is the first."""
        return phases.at(self._p.stages, n)

    def name(self, n: int) -> dict[str, str]:
        """`phase`: the name of the stage of step `n`, where the run has phases."""
        return {"phase": self.stage(n).name} if self._p.experiment.phases else {}

    def flops_per_token(self, n: int) -> float:
        """Training FLOPs per token of step `n`."""
        if not self._flops:
            return self._p.derived["train_flops_per_token"]
        return self._flops[self._p.stages.index(self.stage(n))]

    def definition(self, n: int) -> nn.Definition:
        """The model of step `n`."""
        model = self.stage(n).model
        return _once(self._definitions, model, lambda: lm.define(model))

    def evaluator(self, n: int) -> evaluate.Evaluator:
        """Scores text with the attention of step `n`."""
        data = self._p.dataset
        task = not data.tokenizer.is_text
        return _once(
            self._evaluators,
            self.stage(n).model,
            lambda: evaluate.Evaluator(
                self.definition(n), data.domains, accuracy=task, placed=self._p.placed
            ),
        )

    def credits(self, n: int) -> bool:
        """Whether what the rows of step `n` are worth is measured."""
        every = self._p.experiment.credit.every
        return every > 0 and n % every == 0 and self.stage(n).train == "all"

    def credit(self, n: int, state: Any, batch: Any) -> dict[str, Any]:
        """What the rows of step `n` are worth, for metrics.jsonl, from the state before it."""
        e, stage, data = self._p.experiment, self.stage(n), self._p.dataset
        if not self._targets:
            self._targets = credit.targets(e.credit, data)
        seq = stage.seq if stage.seq != e.data.seq else 0
        made = _once(
            self._creditors,
            (stage.model, seq),
            lambda: credit.Creditor(self.definition(n), e.credit, seq=seq),
        )
        rate = float(self._p.schedule(jnp.asarray(n - 1, jnp.int32)))
        return made(state.params, state.router, batch, self._targets, data.domains, rate)

    def compiled(self, n: int) -> bool:
        """Whether the function of step `n` is there."""
        return any(key == self._key(n) for key, _ in self._steps)

    def step(self, n: int, state: Any, batch: Any) -> Any:
        """The function of step `n`, compiled for these arguments where it is not there yet."""
        return _once(self._steps, self._key(n), lambda: self._compile(n, state, batch))

    def _key(self, n: int) -> tuple[Any, ...]:
        stage = self.stage(n)
        # where prices settle, a step's length goes by its number in the phase
        return stage.model, stage.seq, stage.train, stage.first if stage.train == "prices" else 0

    def _compile(self, n: int, state: Any, batch: Any) -> Any:
        began = time.perf_counter()
        e, stage = self._p.experiment, self.stage(n)
        made: Any = step.make_train_step(
            self.definition(n),
            stage.model,
            self._p.tx,
            schedule=self._p.schedule,
            accumulate=e.accumulate,
            ema=e.ema,
            seq=stage.seq if stage.seq != e.data.seq else 0,
            train=stage.train,
            first=stage.first,
            placed=self._p.placed,
            host=e.offload == "optimizer",
            domains=len(self._p.dataset.domains) if e.data.mixed else 0,
        )
        made = made.lower(state, batch).compile()
        peers.meet()
        self._record.compiled(time.perf_counter() - began)
        return made


def _once(known: list[tuple[Any, Any]], key: Any, make: Callable[[], Any]) -> Any:
    """What was made for an equal key (a model's sections cannot be hashed), else a new one."""
    for other, value in known:
        if other == key:
            return value
    known.append((key, make()))
    return known[-1][1]
