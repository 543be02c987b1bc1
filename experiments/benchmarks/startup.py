"""Seconds from the command to the first training step, with and without the caches.

Question: how long does a user look at nothing? Bar: under 10 seconds with a warm cache.
Command:  python experiments/benchmarks/startup.py
Method:   starts `sparse-pretrain train` in a new process and a new workdir, and watches its
          metrics.jsonl. Metrics are written one step late, so the row of step 1 appears when step 2
          was handed to the device: the time is an upper bound by about a step.
          new machine  empty cache folder: corpus, tokenizer and program are all built
          cold         corpus and tokenizer there, program compiled
          warm         everything there
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu_peers import busy_seconds, device, save

BAR = 10.0


def first_step(options, cache, workdir):
    """Seconds until the first row of metrics.jsonl; the run is then left to finish its 3 steps."""
    command = [
        sys.executable,
        "-m",
        "sparse_pretrain",
        "train",
        "--quiet",
        f"--workdir={workdir}",
        "--config.steps=3",
        "--config.tokens=0",
        "--config.schedule.warmup=0.0",
        "--config.schedule.decay=0.0",
        "--config.eval.tokens=2048",
        "--config.sample.tokens=0",
        *options.arguments,
    ]
    environment = {**os.environ, "SPARSE_PRETRAIN_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    rows = Path(workdir) / "metrics.jsonl"
    before, started = busy_seconds(), time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    busy = None if before is None else busy_seconds() - before
    errors = process.communicate()[1]
    if process.returncode or not rows.exists():
        reason = errors.strip().splitlines()[-1:] or ["no reason given"]
        raise SystemExit(f"{' '.join(command)}: {reason[0]}")
    summary = json.loads((Path(workdir) / "summary.json").read_text())
    return {"seconds": seconds, "machine_cpu_seconds": busy, "compile": summary["compile_seconds"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warm", type=int, default=5, help="warm starts")
    parser.add_argument("--cold", type=int, default=2, help="starts that compile")
    parser.add_argument("--out", default=str(Path(__file__).parents[1] / "results/startup.json"))
    parser.add_argument("arguments", nargs="*", help="further arguments of `train`, after --")
    options = parser.parse_args()
    rows, machine = [], device()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cache, count = folder / "cache", 0

        def start(state):
            nonlocal count
            count += 1
            if state == "cold":
                shutil.rmtree(cache / "xla", ignore_errors=True)
            row = {"state": state, **first_step(options, cache, folder / f"run{count}")}
            rows.append(row)
            print(f"{state:12} {row['seconds']:6.2f} s, {row['compile']:5.2f} s of it compiling")

        start("new machine")
        for _ in range(options.cold):
            start("cold")
        for _ in range(options.warm):
            start("warm")
    table = {}
    for state in dict.fromkeys(r["state"] for r in rows):
        seconds = [r["seconds"] for r in rows if r["state"] == state]
        table[state] = {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "runs": len(seconds),
        }
    met = table["warm"]["median"] < BAR
    verdict = (
        f"warm start: first step after {table['warm']['median']:.1f} s "
        f"({table['warm']['least']:.1f} to {table['warm']['most']:.1f}), "
        f"bar under {BAR:.0f} s: {'met' if met else 'MISSED'}"
    )
    print(verdict)
    result = {"rows": rows, "table": table, "verdict": verdict, "met": met, "device": machine}
    save(options.out, "startup", result)


if __name__ == "__main__":
    main()
