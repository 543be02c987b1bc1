"""Children on this machine: a process each, or many in one that stays."""

import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_pretrain.scaling import engines, process
from sparse_pretrain.scaling.children import Child
from sparse_pretrain.scaling.engines.resident import TRAIN, Resident

OPTIONS = ("gpus",)


def shares(workers: int) -> list[tuple[int, ...]]:
    """The cores of each worker; none where all workers share all of them.

    Two programs whose threads wait for each other on the same cores cost more than they gain.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [()] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers == 1 or workers > len(cores):
        return [()] * workers
    edges = [len(cores) * i // workers for i in range(workers + 1)]
    return [tuple(cores[a:b]) for a, b in itertools.pairwise(edges)]


class Local:
    """`workers` children at a time, each on its share of the cores.

    With `warm` a worker's process stays and runs one child after the other, which saves each the
    seconds of its imports. The option `gpus=0,1` gives each worker one of those, in turn.
    Errors: ValueError naming an option that there is not.
    """

    def __init__(
        self,
        *,
        workers: int,
        options: Mapping[str, str] | None = None,
        root: Path | None = None,
        prefix: Sequence[str] = process.PREFIX,
        warm: bool = False,
        runner: str = TRAIN,
    ):
        del root
        options = options or {}
        engines.unknown_option("local", options, OPTIONS)
        gpus = [g for g in options.get("gpus", "").split(",") if g]
        self._environments = [
            {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(workers)
        ]
        self._prefix, self._runner = tuple(prefix), runner if warm else ""
        self._shares = shares(workers)
        self._free = list(reversed(range(workers)))
        self._residents: dict[int, Resident] = {}
        self._lock = threading.Lock()

    def run(self, child: Child, asked: process.Asked) -> process.Outcome:
        """On the first worker that is free; there always is one."""
        with self._lock:
            slot = self._free.pop()
        try:
            if self._runner:
                return self._resident(slot).run(child, asked)
            return process.execute(
                child,
                self._prefix,
                asked,
                cores=self._shares[slot],
                environment=self._environments[slot],
            )
        finally:
            with self._lock:
                self._free.append(slot)

    def _resident(self, slot: int) -> Resident:
        resident = self._residents.get(slot)
        if resident is None or resident.spent:
            if resident is not None:
                resident.close()
            resident = Resident(self._runner, self._shares[slot], self._environments[slot])
            self._residents[slot] = resident
        return resident

    def close(self) -> None:
        """Ends the workers that stayed."""
        for resident in self._residents.values():
            resident.close()
