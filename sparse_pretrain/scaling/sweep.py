"""Runs the children of a sweep: skips what is finished, resumes what stopped, ranks the results."""

import contextlib
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_pretrain.report import compare, sweeps, workdir
from sparse_pretrain.scaling import live, process, record
from sparse_pretrain.scaling.children import Child
from sparse_pretrain.scaling.engines import Engine
from sparse_pretrain.scaling.engines.local import Local
from sparse_pretrain.scaling.journal import Journal
from sparse_pretrain.scaling.record import State, gather
from sparse_pretrain.scaling.sources import Source, sources
from sparse_pretrain.training import progress

RETRIES = 1
LOOK = 0.5  # seconds between two looks at what the running children have written
WRITE = 2.0  # seconds between two versions of sweep.json, and no more than a fiftieth of the time
METRIC = "bits_per_byte"


@contextlib.contextmanager
def _stop_requests(heard: Callable[[], None]) -> Iterator[None]:
    """Calls `heard` on Ctrl-C, and on a polite kill, so that a job scheduler leaves no orphan."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda *unused: heard()) for n in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


class _Running:
    """A child at work, in a thread that waits for it."""

    def __init__(self, child: Child, place: str, step: int):
        self.child, self.place, self.step = child, place, step
        self.began = time.monotonic()
        self.wish = 0  # see process.STOP
        self.pruned = False

    def asked(self) -> int:
        return self.wish


class Driver:
    """One process's work on a sweep; `run()` does it and says whether it was interrupted."""

    def __init__(
        self,
        file: Path | str,
        found: Sequence[Source],
        root: Path,
        engine: Engine,
        *,
        workers: int,
        retries: int,
        console: Console,
    ):
        self.file, self.sources, self.root, self.engine = file, list(found), root, engine
        self.workers, self.retries = workers, retries
        self.display = live.Display(console)
        self.journal = Journal(root)
        attempts, causes = self.journal.attempts(), self.journal.causes()
        self.states: dict[str, State] = {}
        self._history = (attempts, causes)
        self._pruned = self.journal.latest("pruned")
        self.running: dict[str, _Running] = {}
        # What ended, and None for a request to stop; its put may be called by a signal's handler.
        self._ends: queue.SimpleQueue[tuple[Child, process.Outcome] | None] = queue.SimpleQueue()
        self._wish = 0  # of the user, see process.STOP
        self._again: list[Child] = []
        self._active: set[str] = set()  # begun and not done with
        self._places: dict[str, int] = {}
        self._tries: Counter[str] = Counter()  # by this driver, without progress
        self._owner: dict[str, list[Source]] = {}
        self._looked = self._written = 0.0
        self._cost = 0.0
        for source in self.sources:
            for child in source.children:
                if child.id in source.closed:
                    self._recall(child)

    # --- the children, and where they stand ---

    @property
    def todo(self) -> list[Child]:
        """All known by now, each once."""
        return list({c.id: c for s in self.sources for c in s.children}.values())

    @property
    def total(self) -> int:
        """How many there will be."""
        return sum(source.total for source in self.sources)

    def state(self, child: Child) -> State:
        """Where a child stands."""
        if child.id not in self.states:
            attempts, causes = self._history
            self.states[child.id] = State(
                attempts=attempts.get(child.id, 0), causes=list(causes.get(child.id, []))
            )
        return self.states[child.id]

    def _place(self, child: Child) -> str:
        place = self._places.setdefault(child.id, len(self._places) + 1)
        return f"[{place}/{self.total}]"

    # --- the loop ---

    def run(self) -> bool:
        """Bring every child to its end."""
        self.journal.write("begin", sweep=str(self.file), workers=self.workers)
        try:
            with _stop_requests(self._heard), self.display.shown():
                self._loop()
        finally:
            self.engine.close()
        self.journal.write("end of driver", interrupted=self._wish > 0)
        self.journal.close()
        return self._wish > 0

    def _heard(self) -> None:
        self._wish = min(self._wish + 1, process.KILL)  # a second request ends children at once
        self._ends.put(None)

    def _loop(self) -> None:
        while True:
            if self._wish:
                for running in self.running.values():
                    running.wish = self._wish
            else:
                self._fill()
            if not self.running:
                return
            with contextlib.suppress(queue.Empty):
                self._take(self._ends.get(timeout=LOOK))
                while True:
                    self._take(self._ends.get_nowait())
            now = time.monotonic()
            if now - self._looked > LOOK:
                self._look()
                self._looked = now
            if now - self._written > max(WRITE, 50 * self._cost):
                self.write(interrupted=False)
                self._cost = time.monotonic() - now
                self._written = time.monotonic()

    def _take(self, end: tuple[Child, process.Outcome] | None) -> None:
        if end is not None:
            self._settle(*end)

    def _fill(self) -> None:
        while len(self.running) < self.workers and not self._wish:
            child = self._again.pop(0) if self._again else self._next()
            if child is None:
                return
            self._start(child)

    def _next(self) -> Child | None:
        for source in self.sources:
            while (child := source.next()) is not None:
                owners = self._owner.setdefault(child.id, [])
                if source not in owners:
                    owners.append(source)
                state = self.state(child)
                if state.run is not None:  # two trials of one setting
                    source.ended(child, state.status, state.run)
                elif child.id not in self._active:
                    return child
        return None

    def _start(self, child: Child) -> None:
        self._active.add(child.id)
        before = workdir.read(child.workdir, rows=False)
        if before.status == "finished":
            return self._end(child, "finished", "", before)
        if child.id in self._pruned and self._prunes(child):  # not if the sweep says otherwise now
            return self._end(child, "pruned", self._pruned[child.id]["cause"], before)
        pid = process.trained_by(before)
        if pid is not None and process.is_free(child):  # else it is ours, from before
            cause = f"process {pid} is training it already"
            return self._end(child, "failed", cause, before, final=False)
        state = self.state(child)
        state.status, state.attempts = "running", state.attempts + 1
        place = self._place(child)
        self.display.starts(place, child)
        self.journal.write("start", id=child.id, workdir=child.workdir.name)
        running = _Running(child, place, _step(before))
        self.running[child.id] = running
        threading.Thread(target=self._work, args=(running,), daemon=True).start()

    def _work(self, running: _Running) -> None:
        try:
            outcome = self.engine.run(running.child, running.asked)
        except Exception as e:  # of a library for clusters: the child may well be fine
            text = " ".join(str(e).split()) or type(e).__name__
            outcome = process.Outcome(1, text[:500], lost=True)
        self._ends.put((running.child, outcome))

    def _settle(self, child: Child, outcome: process.Outcome) -> None:
        """An attempt has ended."""
        running = self.running.pop(child.id)
        after = workdir.read(child.workdir, rows=False)
        status, cause = process.judge(outcome, after)
        state = self.state(child)
        if cause and not running.pruned:
            state.causes.append(cause)
        self.journal.write("end", id=child.id, status=status, cause=cause)
        if running.pruned and status != "finished":
            return self._end(child, "pruned", self._pruned[child.id]["cause"], after)
        again = process.worth_a_retry(status, outcome, after)
        if again and not self._wish:
            advanced = _step(after) > running.step  # further than before: that costs no try
            self._tries[child.id] += not advanced
            if self._tries[child.id] <= self.retries:
                state.status = "waiting"
                text = f"{running.place} {child.label}  {status}: {cause}; again"
                self.display.say(text, status)
                self._again.append(child)
                return None
        return self._end(child, status, cause, after, final=not again)

    def _end(
        self, child: Child, status: str, cause: str, run: workdir.Run, *, final: bool = True
    ) -> None:
        """A child is done with: for this driver, or when `final` for good."""
        self._active.discard(child.id)
        state = self.state(child)
        state.status, state.cause, state.run = status, cause, run
        if final:
            for source in self._owner.get(child.id, []):
                source.ended(child, status, run)
        end = cause or f"{run.result(METRIC) or float('nan'):.4f} bits/byte"
        self.display.say(f"{self._place(child)} {child.label}  {status}: {end}", status)

    def _look(self) -> None:
        """Prune what should end, and show the rest."""
        for running in self.running.values():
            if running.wish or not self._prunes(running.child):
                continue
            step = _step(workdir.read(running.child.workdir, rows=False))
            row = {"id": running.child.id, "cause": f"pruned at step {step}"}
            self.journal.write("pruned", **row)
            self._pruned[running.child.id] = row
            running.pruned, running.wish = True, process.STOP
        counts = Counter(s.status for s in self.states.values())
        ended = {k: counts[k] for k in ("finished", "pruned", "failed", "interrupted")}
        shown = {id: (r.place, r.child, r.began) for id, r in self.running.items()}
        self.display.update(shown, ended, self.total)

    def _prunes(self, child: Child) -> bool:
        owners = self._owner.get(child.id, [])
        return bool(owners) and all(source.prune(child) for source in owners)

    def _recall(self, child: Child) -> None:
        """What an earlier process came to about a child that is not run again."""
        state, run = self.state(child), workdir.read(child.workdir, rows=False)
        pruned = self._pruned.get(child.id)
        state.run, state.status = run, "failed"
        if run.status == "finished":
            state.status = "finished"
        elif pruned:
            state.status, state.cause = "pruned", pruned["cause"]
        else:
            state.cause = state.causes[-1] if state.causes else run.cause

    def write(self, *, interrupted: bool) -> dict[str, Any]:
        """`sweep.json` as things stand."""
        states = {c.id: self.state(c) for c in self.todo}
        searches = [s for source in self.sources if (s := source.summary())]
        content = record.build(self.file, self.todo, states, searches, interrupted=interrupted)
        record.write(content, self.root)
        return content


def _step(run: workdir.Run) -> int:
    step = run.metrics[-1].get("step") if run.metrics else 0
    return step if isinstance(step, int) else 0


def run_sweep(
    file: Path | str,
    root: Path | str,
    engine: Engine | None = None,
    *,
    workers: int = 1,
    retries: int = RETRIES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run every child of a sweep file under `root`, and write `sweep.json` and `sweep.html`.

    Finished children are skipped; interrupted and failed ones run again in their workdir, which
    resumes them; one that crashed does so `retries` times by itself, not counting attempts that got
    further than the one before. Ctrl-C lets the running children save, and the same call goes on
    from there, also after this process was killed. The result is the content of `sweep.json`, with
    `interrupted` and, per child, `status` (finished, pruned, failed, interrupted or waiting), its
    `cause`, `attempts` and the `causes` of those that did not finish.
    Errors: ValueError as `children.sources`, and when another process drives this sweep.
    """
    root, console = Path(root), console or progress.console()
    found = sources(file, root)
    root.mkdir(parents=True, exist_ok=True)
    with process.driving(root):
        driver = Driver(
            file,
            found,
            root,
            engine or Local(workers=workers),
            workers=workers,
            retries=retries,
            console=console,
        )
        interrupted = driver.run()
        content = driver.write(interrupted=interrupted)
        _report(driver, content, console)
    return content


def _report(driver: Driver, content: dict[str, Any], console: Console) -> None:
    seen = [c for c in driver.todo if driver.states[c.id].run is not None or c.workdir.exists()]
    page = driver.root / "sweep.html"
    if seen:
        arms = gather(seen)
        runs = [run for arm in arms for run in arm.runs.values()]
        head, tail = sweeps.head(content, runs), sweeps.tail(content, runs)
        title = f"Sweep {Path(driver.file).stem}"
        compare.write_comparison(arms, page, title, head=head, tail=tail)
        record.print_ranking(arms, console)
    for c in content["children"]:
        if c["status"] == "failed":
            text = f"failed: {c['label']}: {c['cause']} (log: {driver.root / c['log']})"
            console.print(text, markup=False, highlight=False, soft_wrap=True, style="red")
    if content["interrupted"]:
        console.print("Interrupted; the same command goes on from here.", markup=False)
    if seen:
        console.print(f"Report: {page}", markup=False, soft_wrap=True)
