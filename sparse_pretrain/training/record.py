"""What run.json says of a run: what it is, where it ran, and how long each process of it took.

Time is kept by launch, one per process that trained here, so that a run which was interrupted and
resumed reports the time of all of them.
"""

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from sparse_pretrain import checkpoint
from sparse_pretrain.training import metrics, processes, run

FILE = "run.json"
REFRESH = 10.0  # seconds of a killed process that the record may miss


class Record:
    """The run.json of a workdir, and the clock of the process that is training there.

    `created` is the first launch's and stays; `argv`, `commit`, `pid`, `host`, `device` and
    `versions` are the latest's. `launches` has one entry per process, oldest first: `time` it
    started, `argv`, `commit`, and `seconds` and `compile_seconds` so far.
    Units: `began` of time.perf_counter, when this process started on the run.
    """

    def __init__(self, workdir: Path, prepared: run.Prepared, argv: list[str], began: float):
        self.path, self._began, self._written = workdir / FILE, began, 0.0
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.content: dict[str, Any] = {
            "name": prepared.experiment.name,
            "status": "running",
            "created": now,
            "argv": argv,
            "pid": os.getpid(),
            "host": platform.node(),
            "commit": commit(),
            **environment(),
            "manifest": prepared.dataset.manifest,
            "derived": prepared.derived,
            "config": prepared.experiment.to_dict(),
        }
        launch = {"time": now, "argv": argv, "commit": self.commit}
        self.launches: list[dict[str, Any]] = [launch | {"seconds": 0.0, "compile_seconds": 0.0}]

    @property
    def commit(self) -> str:
        """The commit of this process."""
        return self.content["commit"]

    def open(self) -> None:
        """Takes over what earlier processes left in the workdir, and writes the file.

        Errors: CheckpointError naming a file that is there and cannot be read.
        """
        earlier = checkpoint.read_json(self.path) or {}
        # a record from before there were launches still says how the run was started
        first = {"time": earlier.get("created")} | {k: earlier.get(k) for k in ("argv", "commit")}
        self.launches = [*earlier.get("launches", [first] if earlier else []), *self.launches]
        self.content["created"] = earlier.get("created") or self.content["created"]
        self.write()

    def total(self, what: str) -> float:
        """`seconds` or `compile_seconds` of all processes of the run, as far as they are known."""
        self._clock()
        return sum(launch.get(what) or 0.0 for launch in self.launches)

    def compiled(self, seconds: float) -> None:
        """Adds to how long this process compiled training steps."""
        self.launches[-1]["compile_seconds"] += seconds

    def write(self, **changes: Any) -> None:
        """The file anew, with changed fields and the time so far."""
        self._clock()
        self.content |= {**changes, "launches": self.launches}
        if not processes.lead():
            return
        write_json(self.path, self.content)
        self._written = time.perf_counter()

    def refresh(self) -> None:
        """Writes the time so far now and then, for the case that this process is killed."""
        if time.perf_counter() - self._written > REFRESH:
            self.write()

    def _clock(self) -> None:
        self.launches[-1]["seconds"] = time.perf_counter() - self._began


def commit() -> str:
    """The checkout's git commit, with '+' when files differ from it; 'unknown' outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if dirty else "")


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


# What a core multiplies with: tokens/s of two machines compare only where these are the same.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "i8mm")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """The CPU's model name and matrix instructions from Linux's list, else what Python knows.

    Units: `cores` of the machine, `usable_cores` of this process.
    """
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        lines = []
    known: dict[str, str] = {}
    for key, _, value in lines:  # of the first core
        known.setdefault(key.strip().lower(), value.strip())
    flags = (known.get("flags") or known.get("features") or "").split()
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {
        "cpu": known.get("model name") or platform.processor() or platform.machine(),
        "features": [f for f in _FEATURES if f in flags],
        "cores": cores,
        "usable_cores": usable,
    }


def environment() -> dict[str, Any]:
    """Device and versions, for the record."""
    import importlib.metadata

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    device = jax.devices()[0]
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "host": platform.machine(),
            **processor(),
        },
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
    }


def peak_memory() -> int:
    """Largest number of bytes held so far: on the device where it says, else by the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes strict JSON in one move, so that a reader never sees half of it.

    Errors: OSError naming the file when it cannot be written; what was there stays.
    """
    text = json.dumps(metrics.plain(record), indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from e
