"""What a sweep costs beside its runs, and what it survives.

Question: how long does the driver take for a run that does nothing, and after 20 `kill -9` of the
driver or of a run, at random moments, is anything lost or run twice?
Command:  python3 experiments/benchmarks/sweep_overhead.py
Cost:     about five minutes on two cores.
Found:    at raised priority on two cores with other work beside it (load 7): 5.7 and 7.0 ms a run
          with two workers that stay and with one, 6.4 and -18 ms beside the 36 and 44 ms of a
          process that does nothing (two of those share what they wait for). At a load of 19 to 30:
          12 to 16 ms, and 43 to 68 at normal priority. Of 1,000 runs in workers that stay, 7 kills
          of the driver and 13 of a run: none lost, none run twice, 13 begun again. So too for 250
          runs in processes. experiments/results/sweep_overhead.json

--runs is of warm workers, which run one after the other in one process; a fourth of it where each
run is a process.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHILD = HERE / "trivial_child.py"
PREFIX = (
    sys.executable,
    "-S",
    "-E",
    str(CHILD),
)  # a program that starts in a hundredth of a second
SWEEP = """from sparse_pretrain.scaling.combinators import param, runs

def get_sweep():
    return runs({experiment!r}, param("optim.lr", [i / {count} for i in range({count})]))
"""


def drive(file: str, root: str, workers: int, warm: bool) -> None:
    """The driver, in this process."""
    from rich.console import Console

    from sparse_pretrain.scaling import sweep
    from sparse_pretrain.scaling.engines.local import Local

    engine = Local(workers=workers, warm=warm, runner=f"{CHILD}:run", prefix=PREFIX)
    console = Console(file=sys.stderr)
    sweep.run_sweep(file, root, engine, workers=workers, retries=5, console=console)


def start(folder: Path, workers: int, warm: bool, seconds: float) -> subprocess.Popen:
    """A driver in a process of its own, its output in driver.txt."""
    command = [sys.executable, __file__, "--drive", str(folder), f"--workers={workers}"]
    environment = {"TRIVIAL_LEDGER": str(folder / "ledger"), "TRIVIAL_SECONDS": str(seconds)}
    with open(folder / "driver.txt", "ab") as log:
        return subprocess.Popen(
            [*command, *(["--warm"] if warm else [])],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
        )


def prepare(folder: Path, count: int) -> None:
    """The sweep file and its experiment."""
    (folder / "trivial.py").write_text("def get_config(arg=None):\n    return {}\n")
    text = SWEEP.format(experiment=str(folder / "trivial.py"), count=count)
    (folder / "sweep.py").write_text(text)


def ledger(folder: Path) -> list[list[str]]:
    """[event, run, process] of all that the runs noted."""
    path = folder / "ledger"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def bare(folder: Path, count: int) -> float:
    """Seconds of a run's program without a driver; nothing to speak of where workers stay."""
    began = time.perf_counter()
    for i in range(count):
        subprocess.run([*PREFIX, f"--workdir={folder}/bare/{i}"], check=True)
    return (time.perf_counter() - began) / count


def overhead(count: int, workers: int, warm: bool) -> dict:
    """Seconds of the driver's whole process, per run that does nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, count)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        code = start(folder, workers, warm, 0.0).wait()
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        alone = 0.0 if warm else bare(folder, 50)
        return {
            "warm": warm,
            "workers": workers,
            "runs": count,
            "seconds": round(seconds, 2),
            "cpu_milliseconds_per_run": round(1e3 * cpu / count, 2),
            "milliseconds_of_a_bare_run": round(1e3 * alone, 2),
            "milliseconds_per_run": round(1e3 * seconds / count, 2),
            **verdict(folder, count, code),
        }


def kills(count: int, workers: int, warm: bool, killed: int, seconds: float, seed: int) -> dict:
    """Kill the driver or a process at work `killed` times; then let it end."""
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, count)
        began = time.perf_counter()
        driver = start(folder, workers, warm, seconds)
        # at random moments that lie within the sweep: after so many more runs have begun
        marks = sorted(rng.sample(range(1, count - workers), killed))
        for mark in marks:
            while _begun(folder) < mark and driver.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * seconds)
            if driver.poll() is None and rng.random() < 0.5:
                driver.kill()
                driver.wait()
                hit["driver"] += 1
                driver = start(folder, workers, warm, seconds)
                continue
            while not (pid := _at_work(folder, rng)) and driver.poll() is None:
                time.sleep(0.002)
            if pid:
                os.kill(pid, signal.SIGKILL)
                hit["run"] += 1
        code = driver.wait()
        return {
            "warm": warm,
            "workers": workers,
            "runs": count,
            "kills": dict(hit),
            "seconds": round(time.perf_counter() - began, 1),
            **verdict(folder, count, code),
        }


def _begun(folder: Path) -> int:
    return len({name for event, name, _ in ledger(folder) if event == "begin"})


def _at_work(folder: Path, rng: random.Random) -> int:
    """A process that has begun a run and not ended it; 0 if there is none."""
    last: dict[str, str] = {}
    for event, _, pid in ledger(folder):
        last[pid] = event
    living = [int(p) for p, event in last.items() if event == "begin" and _is_ours(int(p))]
    return rng.choice(living) if living else 0


def _is_ours(pid: int) -> bool:
    """Whether the process still is one of these, and not another that got its number."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"trivial_child" in command


def verdict(folder: Path, count: int, code: int) -> dict:
    """What the runs themselves, and sweep.json, say in the end."""
    events = Counter(event for event, *_ in ledger(folder))
    ended = {name for event, name, _ in ledger(folder) if event == "end"}
    path = folder / "runs" / "sweep.json"
    record = json.loads(path.read_text()) if path.exists() else {"children": []}
    finished = [c for c in record["children"] if c["status"] == "finished"]
    return {
        "exit": code,
        "finished": len(finished),
        "ended": len(ended),
        "lost": count - len(finished),
        "run_twice": events["twice"],
        "begun_again": events["begin"] - count,
    }


def main() -> None:
    """Both questions, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drive", metavar="FOLDER")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.02, help="of a run, while killing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.drive:
        drive(f"{args.drive}/sweep.py", f"{args.drive}/runs", args.workers, args.warm)
        return
    counts = {True: args.runs, False: args.runs // 4}  # a process a run takes its time to start
    for warm, count in counts.items():
        for workers in sorted({1, args.workers}):
            print(json.dumps(overhead(count, workers, warm)), flush=True)
    for warm, count in counts.items():
        found = kills(count, args.workers, warm, args.kills, args.seconds, args.seed)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
