"""A search as a source of children: Optuna chooses and prunes, its journal remembers.

Whatever is decided about trial n follows from trials up to n - parallel, in their order, and from a
sampler seeded by (seed, n): neither the number of workers nor their speed nor a kill changes it.
"""

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling.children import Child, Maker
from sparse_pretrain.scaling.combinators import Range, Search
from sparse_pretrain.scaling.engines import needs
from sparse_pretrain.training.metrics import read_rows

FILE = "search.jsonl"
STARTUP = (
    5  # trials that the median pruner lets pass, and the random ones of TPE at most twice that
)


class Study:
    """One search: hands out the children of its trials, and tells Optuna what they reached.

    Errors: ValueError when Optuna is not installed.
    """

    def __init__(self, search: Search, maker: Maker):
        self._optuna = needs("optuna", "sweep", "search(...)")
        if search.sampler == "cma":
            needs("cmaes", "sweep", "search(sampler='cma')")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self.search, self._maker = search, maker
        self.children: list[Child] = []
        self._of: dict[int, Child] = {}  # trial -> child
        self._outcomes: dict[int, tuple[str, float | None]] = {}
        self._courts: dict[int, _Court] = {}
        self._told = 0  # trials, in order
        path, _, code = maker.experiment(search.experiment)
        content = [path.name, code, repr(search.space), search.sampler, search.pruner, search.seed]
        content += [search.parallel, search.metric, search.maximize, search.warmup, search.factor]
        content += [search.experiment, sorted(search.fixed.items())]
        digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:10]
        self.name = f"{path.stem}-{digest}"
        self._distributions = {r.key: self._distribution(r) for r in search.space}
        self._keys = {r.key for r in search.space}
        self._open(maker.root)

    def _open(self, root: Path) -> None:
        """Take over what the journal knows, and go on from there."""
        root.mkdir(parents=True, exist_ok=True)
        file = root / FILE
        if file.exists():  # a line that a killed driver did not finish is no event
            data = file.read_bytes()
            if data[-1:] not in (b"", b"\n"):
                file.write_bytes(data[: data.rfind(b"\n") + 1])
        backend = self._optuna.storages.journal.JournalFileBackend(str(file), lock_obj=_Held())
        direction = "maximize" if self.search.maximize else "minimize"
        self._kept = self._optuna.create_study(
            study_name=self.name,
            storage=self._optuna.storages.JournalStorage(backend),
            direction=direction,
            load_if_exists=True,
        )
        # Decisions are made on a copy in memory, so that the journal gets each as one line.
        self._study = self._optuna.create_study(direction=direction)
        trials = self._kept.get_trials(deepcopy=False)
        self._study.add_trials(trials)
        self._told = sum(trial.state.is_finished() for trial in trials)
        assert all(trial.state.is_finished() for trial in trials[: self._told])
        self._asked = self._told  # those beyond are handed out again: their runs resume
        self.closed = {self._child(trial).id for trial in trials[: self._told]}

    def _distribution(self, r: Range) -> Any:
        kinds = self._optuna.distributions
        if r.values:  # by place: Optuna takes no lists
            return kinds.CategoricalDistribution(range(len(r.values)))
        if r.step:
            return kinds.IntDistribution(int(r.low), int(r.high), step=r.step)
        return kinds.FloatDistribution(r.low, r.high, log=r.log)

    def _sampler(self, number: int) -> Any:
        samplers, s = self._optuna.samplers, self.search
        seed = int.from_bytes(hashlib.sha256(f"{s.seed} {number}".encode()).digest()[:4], "big")
        if s.sampler == "cma":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if s.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if s.sampler == "grid":
            space = {r.key: range(len(r.values)) for r in s.space}
            return samplers.GridSampler(space, seed=s.seed)  # one order for the whole search
        startup = min(2 * STARTUP, max(2, s.trials // 3))
        return samplers.TPESampler(seed=seed, n_startup_trials=startup)

    # --- as a source ---

    @property
    def total(self) -> int:
        """Trials; a grid has no more than its points."""
        if self.search.sampler != "grid":
            return self.search.trials
        return min(self.search.trials, math.prod(len(r.values) for r in self.search.space))

    def next(self) -> Child | None:
        """The child of the next trial, when the ones it depends on have ended."""
        number = self._asked
        last = self.total if number >= self.total else number + 1 - self.search.parallel
        while self._told < min(last, len(self._of)):
            if self._told not in self._outcomes:
                return None
            self._tell(self._told)
        if number >= self.total or self._told < last:
            return None
        trials = self._study.get_trials(deepcopy=False)
        if number == len(trials):
            trials = self._ask(number)
        self._asked += 1
        child = self._child(trials[number])
        if self.search.pruner != "none":
            seen = trials[: max(0, number + 1 - self.search.parallel)]
            self._courts[number] = _Court(self._optuna, self.search, seen)
        return child

    def _ask(self, number: int) -> list[Any]:
        self._study.sampler = self._sampler(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental features, none of which we name
            self._study.ask(fixed_distributions=self._distributions)
        trials = self._study.get_trials(deepcopy=False)
        assert len(trials) == number + 1
        self._kept.add_trial(trials[number])
        return trials

    def _child(self, trial: Any) -> Child:
        """Its run; two trials of one setting share it, since runs are deterministic."""
        values = {r.key: trial.params[r.key] for r in self.search.space}
        for r in self.search.space:
            if r.values:
                values[r.key] = r.values[values[r.key]]
        overrides = {**self.search.fixed, **values}
        child = self._maker.child(self.search.experiment, overrides, self._keys)
        if child.id not in {c.id for c in self.children}:
            self.children.append(child)
        self._of[trial.number] = child
        return child

    def ended(self, child: Child, status: str, run: workdir.Run) -> None:
        """Every trial of this child has its outcome."""
        for number, other in self._of.items():
            if other.id != child.id or number in self._outcomes or number < self._told:
                continue
            court = self._courts.get(number)
            if court is not None and court.prunes(child):
                self._outcomes[number] = ("PRUNED", None)
                continue
            value = run.result(self.search.metric)
            good = isinstance(value, (int, float)) and math.isfinite(value)
            if status == "finished" and good:
                self._outcomes[number] = ("COMPLETE", float(value))
            else:
                self._outcomes[number] = ("PRUNED" if status == "pruned" else "FAIL", None)

    def prune(self, child: Child) -> bool:
        """Whether every trial of this child is to end."""
        courts = [
            self._courts.get(n)
            for n, other in self._of.items()
            if other.id == child.id and n not in self._outcomes and n >= self._told
        ]
        return bool(courts) and all(c is not None and c.prunes(child) for c in courts)

    def _tell(self, number: int) -> None:
        state, value = self._outcomes[number]
        self._study.sampler = self._optuna.samplers.RandomSampler(seed=0)  # a grid's would end it
        court = self._courts.pop(number, None)
        for study in (self._study, self._kept):
            trial = study.get_trials(deepcopy=False)[number]
            if court is not None:
                court.copy(study, trial)
            found = self._optuna.trial.TrialState[state]
            study.tell(number, value, state=found)
        self._told += 1

    def summary(self) -> dict[str, Any]:
        """The search, how its trials ended, and the best of them."""
        s = self.search
        ends = [self._outcomes.get(n, ("", None)) for n in range(self._asked)]
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[: self._told]:
            ends[trial.number] = (trial.state.name, trial.value)
        rows: list[dict[str, Any]] = []
        for number, (state, value) in enumerate(ends):
            child, name = self._of[number], state.lower() or "open"
            row = {"number": number, "state": name, "value": value, "id": child.id}
            rows.append(row | {"overrides": child.overrides})
        sign = -1 if s.maximize else 1
        best = min(
            (row for row in rows if row["state"] == "complete"),
            key=lambda row: sign * row["value"],
            default=None,
        )
        counts = {
            key: sum(row["state"] == key for row in rows)
            for key in ("complete", "pruned", "fail", "open")
        }
        head = {"study": self.name, "experiment": s.experiment, "trials": self.total}
        head |= {"sampler": s.sampler, "pruner": s.pruner, "seed": s.seed, "parallel": s.parallel}
        head |= {"metric": s.metric, "maximize": s.maximize, "keys": [r.key for r in s.space]}
        return head | counts | {"best": best, "rows": rows}


class _Court:
    """Decides on one running trial, from what was known when it began."""

    def __init__(self, optuna: Any, s: Search, seen: list[Any]):
        if s.pruner == "asha":
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=s.warmup or "auto", reduction_factor=s.factor
            )
        else:
            pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=s.warmup)
        self._study = optuna.create_study(
            direction="maximize" if s.maximize else "minimize",
            pruner=pruner,
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        self._study.add_trials(seen)
        self._trial = self._study.ask()
        self._metric, self._step, self._verdict = s.metric, -1, False

    def prunes(self, child: Child) -> bool:
        """Whether the evaluations so far say that it should end before its last step."""
        if self._verdict:
            return True
        path = child.workdir / "eval.jsonl"
        rows = read_rows(path)
        if not rows:
            return False
        steps = workdir.read(child.workdir, rows=False).derived.get("steps")
        for row in rows:
            row = row | workdir.section(row, "between")
            step, value = row.get("step"), row.get(self._metric)
            if not isinstance(step, int) or step <= self._step or step == steps:
                continue
            self._step = step
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            self._trial.report(float(value), step)
            if self._trial.should_prune():
                self._verdict = True
                return True
        return False

    def copy(self, study: Any, trial: Any) -> None:
        """What it knows of the trial, into a study."""
        own = self._study.get_trials(deepcopy=False)[-1]
        storage, id = study._storage, trial._trial_id
        for step, value in own.intermediate_values.items():
            storage.set_trial_intermediate_value(id, step, value)
        for key, value in own.system_attrs.items():
            storage.set_trial_system_attr(id, key, value)


class _Held:
    """A lock that needs no file: the driver holds the folder, and a kill leaves nothing behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass
