"""Where the numbers of a run go: JSON lines in the workdir always, other services when asked."""

import contextlib
import importlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_pretrain.config import LogConfig

PROJECT = "sparse-pretrain"
STREAMS = ("metrics", "eval", "moe")


def plain(value: Any) -> Any:
    """`value` as JSON data: arrays become numbers or lists, non-finite floats become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars, without importing either
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # NaN and Infinity are not JSON: most readers refuse the whole line
    return value


def dumps(row: Mapping[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(plain(row), allow_nan=False, ensure_ascii=False, separators=(", ", ": "))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; absent file: none; a line cut short by a crash is left out."""
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        # A complete number can still be a cut one (12 of 1234), so the newline must be there.
        if isinstance(row, dict) and line.endswith(b"\n"):
            yield row, line


def truncate(path: Path, step: int) -> int | None:
    """Drop the rows of a JSONL file that lie past `step`; returns the last step kept, if any.

    The file is replaced whole, so a crash here leaves either the old rows or the new ones.
    """
    path = Path(path)
    if not path.exists():
        return None
    kept = [(row, line) for row, line in _rows(path) if row.get("step", step + 1) <= step]
    data = b"".join(line for _, line in kept)
    if data != path.read_bytes():
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_bytes(data)
        os.replace(fresh, path)
    return kept[-1][0]["step"] if kept else None


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row under flat names; vectors get an index, matrices are left out."""
    flat: dict[str, float] = {}
    for key, value in plain(row).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= scalars(value, name + "/")
        elif isinstance(value, list):
            if not any(isinstance(v, (list, dict)) for v in value):
                flat |= scalars({str(i): v for i, v in enumerate(value)}, name + "/")
        elif isinstance(value, (int, float)):
            flat[name] = float(value)
    return flat


class Jsonl:
    """`metrics.jsonl`, `eval.jsonl` and `moe.jsonl`: each row on disk once its call returns.

    Errors: OSError naming the file that cannot be written.
    """

    def __init__(self, workdir: Path, run: Mapping[str, Any], step: int):
        del run
        self._last = {name: truncate(workdir / f"{name}.jsonl", step) for name in STREAMS}
        with contextlib.ExitStack() as stack:
            # Unbuffered: a row that a full disk refused must not be tried again at the end.
            self._files = {
                name: stack.enter_context(open(workdir / f"{name}.jsonl", "ab", buffering=0))
                for name in STREAMS
            }
            self._paths = {name: str(file.name) for name, file in self._files.items()}
            self._closing = stack.pop_all()

    def append(self, stream: str, row: Mapping[str, Any]) -> None:
        """One row of one of the three files."""
        last, step = self._last[stream], row["step"]
        assert last is None or step >= last, f"{stream}: step {step} after step {last}"
        if step != last:  # a resumed run may evaluate its first step a second time
            self._put(stream, (dumps(row) + "\n").encode())
            self._last[stream] = step

    def _put(self, stream: str, data: bytes) -> None:
        try:
            while data:  # a disk that is filling up takes a part
                data = data[self._files[stream].write(data) :]
        except OSError as e:
            raise OSError(e.errno, e.strerror, self._paths[stream]) from e

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """The scalars of one step."""
        self.append("metrics", {"step": step, **scalars})

    def close(self) -> None:
        """End; every file is closed also when one cannot be."""
        self._closing.close()


def _module(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ValueError(
            f"log.sinks: {extra!r} needs the package {package!r} ({e}): "
            f"python3 -m pip install 'sparse-pretrain[{extra}]'"
        ) from None


class TensorBoard:
    """Event files in `workdir/tensorboard`; rows past the step resumed from are hidden."""

    def __init__(self, workdir: Path, run: Mapping[str, Any], step: int):
        del run
        tensorboard = _module("tensorboardX", "tensorboard")
        # TensorBoard drops what it read before of this step and later ones. At step 0 too: a run
        # that failed before its first checkpoint starts over in the same folder.
        self._writer = tensorboard.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of one step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run (offline with WANDB_MODE=offline); resuming continues the same run.

    Rows past the step resumed from stay in its history beside the new ones: rewinding a run is a
    private preview of the service, and only for its own step, not for one given as a metric.
    """

    def __init__(self, workdir: Path, run: Mapping[str, Any], step: int):
        wandb = _module("wandb", "wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=run["name"],
            id=_identity(workdir, step),
            dir=str(workdir),
            config=dict(run["config"]),
            resume="allow",
        )
        # Its own step only grows, and rows come one step late: the step is a metric instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of one step."""
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


class Mlflow:
    """An MLflow run at MLFLOW_TRACKING_URI; its id is kept in `workdir/mlflow_run_id`.

    Rows past the step resumed from stay beside the new ones: MLflow cannot delete a logged value
    (its issue 2973).
    """

    def __init__(self, workdir: Path, run: Mapping[str, Any], step: int):
        self._mlflow = _module("mlflow", "mlflow")
        kept = workdir / "mlflow_run_id"
        run_id = kept.read_text().strip() if step and kept.exists() else None
        self._mlflow.set_experiment(PROJECT)
        if run_id:
            self._mlflow.start_run(run_id=run_id)
            return
        active = self._mlflow.start_run(run_name=run["name"])
        kept.write_text(active.info.run_id)
        params = {key: str(value)[:500] for key, value in _flat(run["config"]).items()}
        for i in range(0, len(params), 100):  # the server takes at most 100 in one call
            self._mlflow.log_params(dict(list(params.items())[i : i + 100]))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of one step."""
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        """Flush and end."""
        self._mlflow.end_run()


class Trackio:
    """A local trackio run; resuming continues the same run.

    Rows past the step resumed from stay beside the new ones: trackio deletes whole runs only.
    """

    def __init__(self, workdir: Path, run: Mapping[str, Any], step: int):
        self._trackio = _module("trackio", "trackio")
        name = f"{run['name']}-{_identity(workdir, step)[:8]}"
        self._trackio.init(
            project=PROJECT,
            name=name,
            config=dict(run["config"]),
            resume="allow" if step else "never",
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of one step."""
        self._trackio.log(dict(scalars), step=step)

    def close(self) -> None:
        """Flush and end."""
        self._trackio.finish()


SINKS: dict[str, type] = {
    "jsonl": Jsonl,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def _identity(workdir: Path, step: int) -> str:
    """The same for every restart of a run, another for a new run in the same place."""
    kept = workdir / "sink_id"
    if step == 0 or not kept.exists():
        kept.write_text(uuid.uuid4().hex[:16])
    return kept.read_text().strip()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Silent:
    """A Writer that writes nothing: that of every process but the one that does."""

    def train(self, step: int, row: Mapping[str, Any]) -> None:
        """Nothing."""

    eval = moe = train

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *unused: object) -> None:
        return None


class Writer:
    """Sends each row of a run to every configured sink; `step` is the step resumed from.

    `run` is the content of `run.json`, of which `name` and `config` are read. `config.every`
    thins the services only. A row for the last step written is ignored, so each file has one row
    per step.
    Errors: ValueError naming the extra to install when a sink's package is missing.
    """

    def __init__(
        self, workdir: Path, config: "LogConfig", run: Mapping[str, Any], *, step: int = 0
    ):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._every = config.every
        # Services first: a missing package must fail before any file of the run is touched.
        self._services: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for name in SINKS:
                if name in config.sinks and name != "jsonl":
                    self._services[name] = _open(name, workdir, run, step)
                    stack.callback(self._guard, name, lambda sink: sink.close())
            self._jsonl = Jsonl(workdir, run, step)
            stack.callback(self._jsonl.close)
            self._closing = stack.pop_all()

    def train(self, step: int, row: Mapping[str, Any]) -> None:
        """One training step, to `metrics.jsonl`."""
        self._jsonl.write(step, row)
        if step % self._every == 0:
            self._send(step, "train/", row)

    def eval(self, step: int, row: Mapping[str, Any]) -> None:
        """One held-out evaluation, to `eval.jsonl`."""
        self._jsonl.append("eval", {"step": step, **row})
        self._send(step, "eval/", row)

    def moe(self, step: int, row: Mapping[str, Any]) -> None:
        """One look at the expert load, to `moe.jsonl`."""
        self._jsonl.append("moe", {"step": step, **row})
        self._send(step, "moe/", row)

    def _send(self, step: int, prefix: str, row: Mapping[str, Any]) -> None:
        for name in list(self._services):
            flat = scalars({k: v for k, v in row.items() if k != "step"}, prefix)

            def write(sink: Any, flat: dict[str, Any] = flat) -> None:
                sink.write(step, flat)

            self._guard(name, write)

    def _guard(self, name: str, act: Callable[[Any], None]) -> None:
        # A service that goes away mid-run must not take hours of training with it.
        if name not in self._services:
            return
        try:
            act(self._services[name])
        except Exception as e:
            del self._services[name]
            warnings.warn(
                f"log.sinks: {name} stopped ({_first_line(e)}); the run goes on, and "
                "metrics.jsonl keeps every row",
                stacklevel=3,
            )

    def close(self) -> None:
        """Flush and close every sink, also when one fails."""
        self._closing.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _open(name: str, workdir: Path, run: Mapping[str, Any], step: int) -> Any:
    try:
        return SINKS[name](workdir, run, step)
    except ValueError:
        raise
    except Exception as e:  # no key, no server, no database: each service has its own class
        raise ValueError(f"log.sinks: {name!r} could not start: {_first_line(e)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
