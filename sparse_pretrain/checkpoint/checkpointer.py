"""The checkpoints of one run: saves in the background, keeps the newest and the best."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparse_pretrain import spec
from sparse_pretrain.checkpoint.files import CheckpointError, folder, orbax, path_of, reason, steps
from sparse_pretrain.checkpoint.state import VERSION, describe, flatten, load, raw, read_meta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """How often a run is saved and which checkpoints stay.

    Units: `every` steps, 0 for the end of the run only; `keep` newest checkpoints; `best` also
    keeps the one with the lowest held-out bits/byte.
    """

    every: int = 0
    keep: int = 2
    best: bool = True

    def __post_init__(self):
        spec.require(self.every >= 0, f"every: must be 0 or more, got {self.every}")
        spec.require(self.keep >= 1, f"keep: must be at least 1, got {self.keep}")


class Checkpointer:
    """Saves every so many steps and keeps the `keep` newest checkpoints and the best one.

    Best is the lowest `bits_per_byte` among the metrics given to `save`. At most one save is under
    way; a failed one raises at the next `save`, `wait` or `close`.
    """

    def __init__(self, workdir: str | Path, *, every: int = 0, keep: int = 2, best: bool = True):
        Config(every=every, keep=keep, best=best)
        self.workdir, self.root = Path(workdir).absolute(), folder(workdir)
        self.every, self.keep, self.keep_best = every, keep, best
        self._pending: tuple[int, Any, float | None] | None = None
        self._scores: dict[int, float | None] = {}
        self._swept = False

    def due(self, step: int) -> bool:
        """Whether `step` (the number of finished steps) is one to save at."""
        return bool(self.every) and step > 0 and step % self.every == 0

    def latest(self) -> int | None:
        """The newest committed step, None without any."""
        found = steps(self.workdir)
        return found[-1] if found else None

    def best(self) -> int | None:
        """The committed step with the lowest bits/byte, None when none was measured."""
        scores = {s: self._score(s) for s in steps(self.workdir)}
        known = {s: v for s, v in scores.items() if v is not None and math.isfinite(v)}
        return min(known, key=lambda s: (known[s], -s)) if known else None

    def save(
        self,
        step: int,
        state: Any,
        *,
        cursor: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        commit: str = "",
    ) -> bool:
        """Starts writing a checkpoint and returns as soon as `state` may be donated or changed.

        Returns False, and does nothing, when this step is already saved or being saved.
        Errors: CheckpointError naming the path when this or the previous save cannot be written;
        earlier checkpoints stay as they are.
        """
        self.wait()
        path = self.root / f"{step:08d}"
        if path.exists():
            return False
        groups = flatten(state)
        score = (metrics or {}).get("bits_per_byte")
        meta = {
            "version": VERSION,
            "step": int(step),
            "cursor": dict(cursor),
            "config": dict(config),
            "metrics": dict(metrics or {}),
            "commit": commit,
            "leaves": {n: describe(x) for leaves in groups.values() for n, x in leaves.items()},
        }
        json.dumps(meta)  # a cursor that is not plain data fails here, not in a thread
        arrays = {k: {n: raw(x) for n, x in v.items()} for k, v in groups.items() if v}
        needed = sum(x.nbytes for v in arrays.values() for x in v.values())
        try:
            self._make_room(needed)
            response = orbax().save_checkpointables_async(path, arrays, custom_metadata=meta)
        except Exception as e:
            raise self._failed(step, e) from None
        self._pending = (step, response, score)
        return True

    def wait(self) -> None:
        """Returns when no save is under way; raises the CheckpointError of one that failed."""
        if self._pending is None:
            return
        (step, response, score), self._pending = self._pending, None
        try:
            response.result()
        except Exception as e:
            raise self._failed(step, e) from None
        self._scores[step] = score
        self._rotate()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state saved at `step` (the newest by default) and its data cursor.

        Shapes: `template` is a state of arrays or of ShapeDtypeStructs; each leaf is restored with
        the template's sharding, whatever devices wrote it.
        Errors: CheckpointError when there is none, it is damaged, or a leaf does not match, naming
        the first such leaf with both shapes.
        """
        self.wait()
        path = path_of(self.workdir, step)
        meta = read_meta(path)
        return load(path, meta, template, partial=False), meta["cursor"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: step, cursor, config, metrics, commit, leaves."""
        return read_meta(path_of(self.workdir, step))

    def find(self, which: str) -> int:
        """The step of `last`, `best` or a number.

        Errors: CheckpointError naming the steps that there are when this one is not among them.
        """
        found = steps(self.workdir)
        if not found:
            raise CheckpointError(f"{self.root}: no checkpoint here yet")
        there = f"steps there are {', '.join(map(str, found))}"
        if which == "last":
            return found[-1]
        if which == "best":
            best = self.best()
            if best is None:
                raise CheckpointError(f"{self.root}: no checkpoint was scored; {there}")
            return best
        if not which.isdecimal() or int(which) not in found:
            raise CheckpointError(f"{self.root}: no checkpoint {which!r}; {there}, or last or best")
        return int(which)

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            try:
                metrics = read_meta(self.root / f"{step:08d}")["metrics"]
            except CheckpointError:
                metrics = {}
            self._scores[step] = metrics.get("bits_per_byte")
        return self._scores[step]

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        if jax.process_index() == 0:
            for left in self.root.glob(f"{step:08d}.*"):
                shutil.rmtree(left, ignore_errors=True)
        path = self.root / f"{step:08d}"
        return CheckpointError(
            f"{path}: checkpoint not written: {reason(error)}; earlier checkpoints are intact"
        )

    def _make_room(self, needed: int) -> None:
        """Makes the folder, drops what killed saves left, and refuses a disk that is too small."""
        self.root.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0 and not self._swept:
            for left in self.root.iterdir():
                if left.is_dir() and not left.name.isdigit():
                    shutil.rmtree(left, ignore_errors=True)
        self._swept = True
        free = shutil.disk_usage(self.root).free
        # Random mantissas hardly compress, so the arrays' size is the checkpoint's.
        if free < needed:
            raise OSError(
                f"No space left on device: needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB free"
            )

    def _rotate(self) -> None:
        """Removes all but the newest and the best; a rename first, so none is ever half there."""
        if jax.process_index() != 0:
            return
        found = steps(self.workdir)
        stay = set(found[-self.keep :])
        if self.keep_best and (best := self.best()) is not None:
            stay.add(best)
        for step in found:
            if step not in stay:
                gone = self.root / f"{step:08d}.removed"
                (self.root / f"{step:08d}").rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
