"""Checkpoints of a run: written in the background, committed by one rename, newest and best kept.

A checkpoint is a folder `checkpoints/00001200` that orbax renames into place when every byte is on
disk, so what has that name is whole. State is saved as one flat dict per top-level field, keyed by
the leaf's path; a resumed run needs no Python class of the run that wrote it.
"""

import dataclasses
import json
import math
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_pretrain import spec

FOLDER = "checkpoints"
VERSION = 1
# Sections that change neither the arrays nor what they are trained on.
FREE = ("checkpoint", "log", "eval", "sample", "name", "workdir")
# A longer run stretches the schedule, and another split of the work rounds differently: allowed,
# and said.
NOTED = ("steps", "tokens", "accumulate", "plan")


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


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, read or matched; one line naming the path."""


def _orbax() -> Any:
    # Half a second of imports, needed first when a checkpoint is read or written.
    from orbax.checkpoint.experimental import v1

    return v1


def warm() -> None:
    """Imports orbax in a background thread, best called just before the first compilation."""
    threading.Thread(target=_orbax, daemon=True).start()


def folder(workdir: str | Path) -> Path:
    """Where the checkpoints of a workdir are."""
    return Path(workdir).absolute() / FOLDER


def steps(workdir: str | Path) -> list[int]:
    """Steps of the committed checkpoints in a workdir, oldest first."""
    root = folder(workdir)
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def _reason(error: BaseException) -> str:
    """The part of an error a user can act on, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "Permission denied", "Read-only file system"):
        if known in text:
            return known
    return text[:200]


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
        groups = _flatten(state)
        score = (metrics or {}).get("bits_per_byte")
        meta = {
            "version": VERSION,
            "step": int(step),
            "cursor": dict(cursor),
            "config": dict(config),
            "metrics": dict(metrics or {}),
            "commit": commit,
            "leaves": {n: _describe(x) for leaves in groups.values() for n, x in leaves.items()},
        }
        json.dumps(meta)  # a cursor that is not plain data fails here, not in a thread
        arrays = {k: {n: _raw(x) for n, x in v.items()} for k, v in groups.items() if v}
        needed = sum(x.nbytes for v in arrays.values() for x in v.values())
        try:
            self._make_room(needed)
            response = _orbax().save_checkpointables_async(path, arrays, custom_metadata=meta)
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
        path = _path(self.workdir, step)
        meta = read_meta(path)
        return _load(path, meta, template, partial=False), meta["cursor"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: step, cursor, config, metrics, commit, leaves."""
        return read_meta(_path(self.workdir, step))

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
            f"{path}: checkpoint not written: {_reason(error)}; earlier checkpoints are intact"
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


def _path(workdir: str | Path, step: int | None) -> Path:
    found, root = steps(workdir), folder(workdir)
    if not found:
        raise CheckpointError(f"{root}: no checkpoint here")
    if step is None:
        return root / f"{found[-1]:08d}"
    if step not in found:
        raise CheckpointError(f"{root}: no checkpoint at step {step}; there are {found}")
    return root / f"{step:08d}"


def read_meta(path: Path) -> dict[str, Any]:
    """The plain data in a checkpoint folder.

    Errors: CheckpointError naming the path when it is missing or damaged.
    """
    try:
        meta = _orbax().checkpointables_metadata(path).custom_metadata
        assert meta["version"] == VERSION
        return meta
    except Exception as e:
        raise _damaged(path, e) from None


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: checkpoint is damaged ({_reason(error)}); remove this folder to use an older one"
    )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _flatten(state: Any) -> dict[str, dict[str, Any]]:
    """Top-level field -> leaf path -> leaf."""
    groups: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        groups.setdefault(_name(path[:1]), {})[_name(path)] = leaf
    return groups


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: Any) -> Any:
    """A leaf as orbax stores it: keys as their bits, host scalars as arrays."""
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    return jax.random.key_data(x) if _is_key(x) else x


def _describe(x: Any) -> list[Any]:
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    return [str(x.dtype), list(x.shape)]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding to restore a leaf with; orbax warns when it has to guess them."""
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if _is_key(x):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        if isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(*sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _match(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """CheckpointError naming the first leaf that the checkpoint lacks or holds otherwise."""
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{path}: holds no {name}, which has shape {leaf.shape} here")
        dtype, shape = saved[name]
        if tuple(shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(shape)} there and {tuple(leaf.shape)} here"
            )
        if dtype != str(leaf.dtype):
            raise CheckpointError(f"{path}: {name} is {dtype} there and {leaf.dtype} here")


def _load(path: Path, meta: Mapping[str, Any], template: Any, *, partial: bool) -> Any:
    template = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), template)
    groups = _flatten(template)
    wanted = {n: x for leaves in groups.values() for n, x in leaves.items()}
    saved = meta["leaves"]
    if partial:
        fields = {n.split(".", 1)[0] for n in wanted}
        saved = {n: v for n, v in saved.items() if n.split(".", 1)[0] in fields}
    _match(path, saved, wanted)
    extra = sorted(set(saved) - set(wanted))
    if extra:
        shape = tuple(saved[extra[0]][1])
        raise CheckpointError(f"{path}: {extra[0]} of shape {shape} there has no place here")
    abstract = {k: {n: _abstract(x) for n, x in v.items()} for k, v in groups.items() if v}
    try:
        loaded = _orbax().load_checkpointables(path, abstract)
    except Exception as e:
        raise _damaged(path, e) from None
    arrays = {n: x for leaves in loaded.values() for n, x in leaves.items()}

    def place(where, leaf):
        x = arrays[_name(where)]
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else x

    return jax.tree_util.tree_map_with_path(place, template)


def init_from(
    workdir: str | Path,
    params: Any,
    prices: Any,
    step: int | None = None,
    *,
    averaged: bool = False,
) -> tuple[Any, Any]:
    """(params, prices) of another run, which a new run starts from or a command reads.

    Shapes: `params` and `prices` are templates, arrays or ShapeDtypeStructs; optimizer, step, keys
    and cursor stay in the checkpoint. `averaged` takes the moving average where the run kept one.
    Errors: CheckpointError naming the first parameter that does not match, with both shapes.
    """
    path = _path(workdir, step)
    meta = read_meta(path)
    kept = averaged and any(name.startswith("ema.") for name in meta["leaves"])
    field = "ema" if kept else "params"
    loaded = _load(path, meta, {field: params, "router": prices}, partial=True)
    return loaded[field], loaded["router"]


def differing(saved: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, new value) wherever two resolved configs differ."""
    a, b = _dotted(json.loads(json.dumps(saved))), _dotted(json.loads(json.dumps(new)))
    absent = "absent"
    pairs = {k: (a.get(k, absent), b.get(k, absent)) for k in {**a, **b}}
    return {k: v for k, v in sorted(pairs.items()) if v[0] != v[1]}


def check_compatible(
    saved: Mapping[str, Any], new: Mapping[str, Any], workdir: str | Path = ""
) -> list[str]:
    """Notes on what a resumed run does otherwise than the one it resumes, one line each.

    Keys of FREE sections may change silently and those in NOTED with a note; everything else
    shapes the state or what it is fed.
    Errors: ValueError naming the workdir and every other differing key with both values.
    """
    notes, refused = [], []
    for key, (old, now) in differing(saved, new).items():
        if key in NOTED:
            notes.append(f"{key}: {old!r} before, {now!r} from here on")
        elif key.split(".", 1)[0] not in FREE:
            refused.append(f"{key}: {old!r} there, {now!r} here")
    if refused:
        where = str(workdir) or "the workdir"
        raise ValueError(
            f"{where} holds a run of another config: " + "; ".join(refused) + "; use a new workdir"
        )
    return notes


def read_json(path: str | Path) -> Any:
    """What a JSON file holds, None when there is no such file.

    Errors: CheckpointError naming a file that is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path}: cannot be read ({_reason(e)})") from None


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _dotted(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
