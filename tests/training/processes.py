"""Runs of `sparse-pretrain train` as several processes on this machine, over loopback."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

CONFIG = '''
def get_config(arg=""):
    attention = dict(kind="mla", heads=4, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8)
    router = dict(kind="sigmoid_bias", rate=0.01)
    moe = dict(kind="moe", experts=4, top_k=2, hidden=16, shared=1, router=router)
    return dict(
        name="tiny", steps=int(arg or 6),
        data=dict(source="synthetic:copy", seq=64, batch=24),
        model=dict(
            width=48, dtype="float32", blocks=dict(b=dict(attention=attention, ffn=moe)),
            pattern=("b",), repeats=2,
        ),
        optim=dict(kind="adamw", lr=0.01),
        schedule=dict(kind="constant", warmup=0.0),
        checkpoint=dict(every=3, best=False),
        eval=dict(tokens=512), sample=dict(tokens=0),
    )
'''
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def port(among: Iterable[int] = (0,)) -> int:
    """The first of these that is free; any, of 0."""
    for number in among:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", number))
            return free.getsockname()[1]
    raise OSError("no port is free")


def start(folder: Path, name: str, *, processes: int, devices: int, mesh: str, steps: int = 6,
          more: tuple[str, ...] = ()):  # fmt: skip
    """The processes of a run in `folder`/`name`, as they are started."""
    config = folder / "tiny.py"
    config.write_text(CONFIG)
    where = port()
    command = [
        sys.executable, "-m", "sparse_pretrain", "train", f"--config={config}:{steps}",
        "--plan=fsdp_ep", f"--mesh={mesh}", f"--cpu-devices={devices}",
        f"--workdir={folder / name}", "--quiet", *more,
    ]
    found = []
    for i in range(processes):
        join = [f"--coordinator=127.0.0.1:{where}", f"--processes={processes}", f"--process-id={i}"]
        with (folder / f"{name}.{i}.log").open("w") as log:
            found.append(
                subprocess.Popen(
                    command + (join if processes > 1 else []),
                    stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
                )
            )  # fmt: skip
    return found


def finish(folder: Path, name: str, running, *, timeout: float = 900) -> list[float]:
    """The losses of the run when all its processes are done."""
    codes = [process.wait(timeout) for process in running]
    logs = {p.name: p.read_text()[-600:] for p in folder.glob(f"{name}.*.log")}
    assert not any(codes), (codes, logs)
    return losses(folder / name)


def losses(workdir: Path) -> list[float]:
    """Per step, from metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
