"""The run: steps, metrics one step late, evaluations, checkpoints, and the record it leaves."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from sparse_pretrain import checkpoint, config
from sparse_pretrain.planning import chips
from sparse_pretrain.training import (
    auto,
    course,
    credit,
    metrics,
    processes,
    progress,
    record,
    recovery,
    replace,
    rows,
    run,
    state,
)

AGAIN = 20.0  # seconds of training after which measuring the peak once more costs next to nothing


def train(
    experiment: config.Experiment,
    workdir: Path,
    argv: list[str],
    *,
    quiet: bool = False,
    on_finish: Callable[[Path], Any] | None = None,
) -> dict[str, Any]:
    """Trains to the end, resuming what `workdir` holds, and returns the summary.

    The same configuration in the same workdir continues where it stopped, to the bit. `on_finish`
    is called with the workdir when all files but the report are there.
    Errors: ValueError when the workdir belongs to another configuration; RunFailed on a loss that
    is not finite; Interrupted after a stop signal: while steps are taken with the checkpoint
    written, before and after them at once.
    """
    try:
        with recovery.interruptible():
            return _train(experiment, Path(workdir), argv, quiet, on_finish)
    except KeyboardInterrupt as e:
        kind = recovery.Abandoned if isinstance(e, recovery.Twice) else recovery.Interrupted
        done = checkpoint.steps(workdir)
        place = f"continues from step {done[-1]}" if done else "starts again"
        raise kind(f"interrupted; the same command {place}") from None


def _train(experiment, workdir, argv, quiet, on_finish) -> dict[str, Any]:
    began = time.perf_counter()
    quiet = quiet or not processes.lead()
    run.prepare_process()
    summary = run.finished(experiment, workdir)
    if summary is not None:
        derived = (checkpoint.read_record(workdir) or {})["derived"]
        _say(quiet, f"{run.headline(experiment, derived)}; {workdir}, finished already")
    else:
        experiment, chosen = auto.planned(experiment)
        if chosen:
            _say(quiet, chosen)
        with _quietly(quiet, "preparing the data"):
            prepared = run.prepare(experiment, workdir)
        _say(quiet, f"{run.headline(prepared.experiment, prepared.derived)}; {workdir}")
        summary = Trainer(prepared, workdir, argv, quiet=quiet, began=began).run()
    if on_finish is not None and processes.lead():
        on_finish(workdir)
    return summary


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _quietly(quiet: bool, text: str):
    # on standard output, as the progress bar is: standard error is for what went wrong
    return contextlib.nullcontext() if quiet else progress.status(text, Console())


class Trainer:
    """One process's view of a run; `run()` does it."""

    def __init__(
        self, prepared: run.Prepared, workdir: Path, argv: list[str], *, quiet: bool, began: float
    ):
        self.p, self.workdir, self.quiet = prepared, workdir, quiet
        self.experiment = prepared.experiment
        self.steps = prepared.run.steps
        c = self.experiment.checkpoint
        self.saver = checkpoint.Checkpointer(workdir, every=c.every, keep=c.keep, best=c.best)
        self.config_dict = self.experiment.to_dict()
        self.record = record.Record(workdir, prepared, argv, began)
        self.course = course.Course(prepared, self.record)
        self.replacer: replace.Replacer | None = None
        if self.experiment.placement.every:
            where = run.placing(self.experiment, prepared.placed)
            self.replacer = replace.Replacer(where, prepared.definition, prepared.placed)
        self.peak = 0.0  # FLOP/s, as measured before the first step
        self.scores: dict[str, Any] | None = None  # of the last evaluation
        self.credit: dict[str, Any] = {}  # of the rows of the last step that it was measured for
        self.begun = False  # whether the workdir is known to be this run's, and run.json its record

    # --- before the first step ---

    def _start(self) -> tuple[state.TrainState, Any]:
        """(state, training iterator): fresh, resumed, or from another run's weights."""
        e, p = self.experiment, self.p
        for note in run.same_run(e, self.workdir):
            _say(self.quiet, f"note: config.{note}")
        run.check_phases(e, self.workdir, p.dataset.train_tokens)
        game = replace.start(e.model) if e.placement.every else {}
        train_state = state.create(
            p.definition, p.tx, e.seed, ema=e.ema > 0, game=game, placed=p.placed,
            host=e.offload == "optimizer",
        )  # fmt: skip
        cursor = None
        if self.saver.latest() is not None:
            train_state, cursor = self.saver.restore(train_state)
            done = int(train_state.step)
            if done > self.steps:
                raise ValueError(
                    f"config.steps: {self.steps} asked for, {done} are done in {self.workdir}; "
                    "use a new workdir"
                )
        elif e.init_from:
            source, done = run.start_from(e)
            run.check_tokenizer(source, p.dataset.manifest)
            params, prices = checkpoint.init_from(
                source, train_state.params, train_state.router, done
            )
            copy = np.copy if p.placed is None else jnp.copy
            average = jax.tree.map(copy, params) if e.ema else {}
            train_state = train_state._replace(params=params, router=prices, ema=average)
        return train_state, p.dataset.train(cursor)

    # --- the run ---

    def run(self) -> dict[str, Any]:
        """Steps from where the workdir stands to the end; returns the summary.

        Whatever stops it is written to run.json before it is raised again; what keeps it from
        starting leaves the workdir as it was.
        """
        with recovery.alone(self.workdir) if processes.lead() else contextlib.nullcontext():
            try:
                summary = self._run()
            except BaseException as e:
                e = processes.lost(e) or e
                if self.begun:
                    stopped = isinstance(e, (recovery.Interrupted, KeyboardInterrupt))
                    status = "interrupted" if stopped else "failed"
                    reason = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
                    with contextlib.suppress(OSError):  # of a full disk: `e` says it already
                        self.record.write(status=status, error=reason)
                if isinstance(e, processes.PeerLost):  # who would wait for it, waits for ever
                    raise e from None
                self.saver.close()
                raise
            self.saver.close()
            return summary

    def _run(self) -> dict[str, Any]:
        checkpoint.warm()
        train_state, batches = self._start()
        self.batches = batches
        start = int(train_state.step)
        self.record.open()
        self.begun = True
        # with it the weights can be used when the corpus that made it is gone
        if processes.lead():
            self.p.dataset.tokenizer.save(self.workdir / run.TOKENIZER)
        writer: Any = metrics.Silent()
        if processes.lead():
            writer = metrics.Writer(
                self.workdir, self.experiment.log, self.record.content, step=start
            )
        bar = _NoBar() if self.quiet else progress.Bar(self.steps, start=start)
        with writer:
            self.writer = writer
            if start < self.steps:
                first = next(batches)
                with _quietly(self.quiet, "compiling the training step"):
                    self.course.step(start + 1, train_state, self.p.put(first))
                with bar, recovery.stop_requests() as asked:
                    train_state = self._loop(train_state, first, batches, bar, asked)
            summary = self._finish(train_state)
        return summary

    def _loop(self, train_state, batch, batches, bar, asked):
        """Every step; a step's metrics are read after the next one was handed to the device."""
        e = self.experiment
        self.peak, _ = chips.peak_flops()
        pending, first, clock = None, int(train_state.step), _clock()
        stop = processes.Stop(asked)
        for n in range(first + 1, self.steps + 1):
            begins, credits = not self.course.compiled(n), self.course.credits(n)
            if begins or credits:  # no part of a step's time
                if pending is not None:
                    self._report(*pending, clock, bar)
                    pending = None
                if begins:  # a phase
                    self.course.step(n, train_state, self.p.put(batch))
                if credits:
                    self.credit = self.course.credit(n, train_state, batch)
                clock = _clock()
            rows_here = self.p.put(batch)
            train_state, out = self.course.step(n, train_state, rows_here)(train_state, rows_here)
            if self.replacer is not None and n % e.placement.every == 0:
                train_state = self.replacer(train_state)
            if pending is not None:
                clock = self._report(*pending, clock, bar)
            pending = (n, out, batch)
            asked_now = stop.now(n)
            save = asked_now or self.saver.due(n)
            score = n < self.steps and e.eval.every > 0 and n % e.eval.every == 0
            if save or score or n == self.steps:
                clock = self._report(*pending, clock, bar)
                pending = None
            bits = self._evaluate(train_state, n) if score else None
            if n == self.steps or save or (score and e.checkpoint.best):
                last = n == self.steps
                if last and e.checkpoint.best:  # the score decides what is kept
                    bits = self._evaluate(train_state, n)
                self._save(n, train_state, batches.get_state(), bits)  # n was told to its game
                if last and not e.checkpoint.best:  # a crash in scoring costs no training
                    self._evaluate(train_state, n)
            if save or score:
                clock = _clock()
            if asked_now and n < self.steps:
                self.saver.wait()
                raise recovery.Interrupted(
                    f"stopped at step {n} of {self.steps}; the checkpoint is written, run the same "
                    "command again to continue"
                )
            if n < self.steps:
                batch = next(batches)
        return train_state

    def _report(self, n, out, batch, clock, bar) -> tuple[float, float]:
        """Reads a step's metrics (waiting for the device), writes and shows them."""
        out = jax.device_get(out)
        now = _clock()
        loss, seconds, cpu = float(out["loss"]), now[0] - clock[0], now[1] - clock[1]
        if not (math.isfinite(loss) and math.isfinite(float(out["grad_norm"]))):
            path = recovery.save_batch(self.workdir, n, batch)
            raise recovery.RunFailed(
                f"step {n}: loss {loss} and gradient norm {float(out['grad_norm'])} are not both "
                f"finite; the batch is saved as {path.name}, earlier checkpoints are intact"
            )
        per_step = self.p.run.tokens_per_step
        row = {"step": n, "tokens": n * per_step, **self.course.name(n)}
        row |= rows.of_step(out, tokens=per_step, seconds=seconds, cpu=cpu)
        if "domains" in out:
            worth = credit.per_token(self.credit) if self.course.credits(n) else None
            row |= self.batches.learn(*out["domains"], worth)
        row |= self.credit if self.course.credits(n) else {}
        row["mfu"] = row["tokens_per_second"] * self.course.flops_per_token(n) / self.peak
        if out["max_vio"] and (n % max(1, self.steps // 100) == 0 or n in (1, self.steps)):
            self.writer.moe(n, rows.of_experts(out))
        self.writer.train(n, row)
        self.record.refresh()
        bar.update(n, row)
        return now

    def _evaluate(self, train_state, n: int) -> float:
        """Scores the held-out text; the bits/byte that a checkpoint is compared by."""
        section, last = self.experiment.eval, n == self.steps
        params = train_state.ema or train_state.params

        def score(limit: int) -> dict[str, Any]:
            batches = self.p.dataset.heldout(limit_tokens=limit or None)
            scores = self.course.evaluator(n)(params, train_state.router, batches)
            return rows.scored(scores)

        with _quietly(self.quiet or not last, "scoring the held-out text"):
            row = score(section.tokens if last else section.between or section.tokens)
            self.scores, compared = row, row
            if last and section.between:
                compared = score(section.between)
                parts = ("per_domain", "by_position")
                row = row | {"between": {k: v for k, v in compared.items() if k not in parts}}
        at = {"tokens": n * self.p.run.tokens_per_step, **self.course.name(n)}
        self.writer.eval(n, {**at, **row})
        return compared["bits_per_byte"]

    def _save(self, n, train_state, cursor, bits) -> None:
        self.saver.save(
            n,
            train_state,
            cursor=cursor,
            config=self.config_dict,
            metrics=None if bits is None else {"bits_per_byte": bits},
            commit=self.record.commit,
        )

    # --- after the last step ---

    def _finish(self, train_state) -> dict[str, Any]:
        if self.scores is None:
            self._evaluate(train_state, self.steps)
        assert self.scores is not None
        self.saver.close()
        sample = self._sample(train_state)
        if not processes.lead():
            return {}
        steps = metrics.read_rows(self.workdir / "metrics.jsonl")
        seconds = sum(r["step_seconds"] for r in steps[1:])
        tokens = self.p.run.tokens_per_step * max(len(steps) - 1, 0)
        d = self.p.derived
        wall, training = self.record.total("seconds"), sum(r["step_seconds"] for r in steps)
        summary = {
            "name": self.experiment.name,
            "steps": self.steps,
            "tokens": self.p.run.tokens,
            **self.scores,
            "train_loss": float(np.mean([r["loss"] for r in steps[-20:]])),
            **rows.batch_balance(steps),
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "mfu": float(np.median([r["mfu"] for r in steps])) * self._peak_ratio(training),
            "compile_seconds": self.record.total("compile_seconds"),
            "train_seconds": training,  # of steps that stayed, not of those a crash undid
            "train_cpu_seconds": rows.cpu_seconds(steps),
            "wall_seconds": wall,
            "goodput": training / wall,
            "peak_memory_bytes": record.peak_memory(),
            "flops": d["flops"],
            "total_params": d["total_params"],
            "active_params": d["active_params"],
            **({"mixture": self.batches.mean_weights} if self.experiment.data.mixed else {}),
            **credit.totals(steps),
            "manifest_hash": self.p.dataset.manifest.get("hash"),
            "commit": self.record.commit,
            "sample": sample,
        }
        record.write_json(self.workdir / "summary.json", summary)
        self.record.write(status="finished", error=None)
        return summary

    def _peak_ratio(self, seconds: float) -> float:
        """What the peak that rows were written by is of that known now; a long run asks again."""
        return self.peak / chips.peak_again() if self.peak and seconds > AGAIN else 1.0

    def _sample(self, train_state) -> dict[str, Any] | None:
        from sparse_pretrain.interop import generate

        s = self.experiment.sample
        if not s.tokens or not self.p.dataset.tokenizer.is_text:
            return None
        held = (train_state.ema or train_state.params, train_state.router)
        if self.p.placed is not None:
            held = self.p.placed.whole(held)
        if not processes.lead():
            return None
        with _quietly(self.quiet, "writing a sample"):
            text = generate.generate(
                self.course.definition(self.steps),
                *held,
                self.p.dataset.tokenizer,
                s.prompt,
                tokens=s.tokens,
                temperature=s.temperature,
                top_p=s.top_p,
                seed=self.experiment.seed,
            )
        return {"prompt": s.prompt, "text": text}


def _clock() -> tuple[float, float]:
    """(seconds, CPU seconds of this process so far)."""
    return time.perf_counter(), time.process_time()


class _NoBar:
    def __enter__(self):
        return self

    def __exit__(self, *unused):
        return None

    def update(self, n, row):
        """Shows nothing."""
