"""Tokens per second on a CPU, ours against Hugging Face and nanoGPT, side by side in one run.

Question: on two ordinary cores, is our training step at least twice as fast as Hugging Face's on a
small DeepSeek-V3 and 1.3 times as fast on a dense model; and how soon does our trainer reach the
loss that nanoGPT's CPU recipe reaches in torch?

Command: python experiments/benchmarks/cpu_peers.py --peer-python=PATH_TO_PYTHON_WITH_TORCH
         (needs the extra `bench` when no --peer-python is given; --part=shakespeare --data=FILE)
Method:  one worker process per arm; the driver lets one at a time run, a few steps per turn, in a
         new random order every round, and waits for a quiet machine. A step is forward, backward
         and optimizer. Compilation is outside the turns and reported apart. `cores` is processor
         time over wall time; `others` is what the rest of the machine used meanwhile, in cores.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peers_common as common

HERE = Path(__file__).resolve().parent
BARS = {"moe": 2.0, "dense": 1.3}
QUIET = 0.15  # cores others may use before a turn waits or is repeated
NOISY = 0.4  # cores others may use before a comparison means nothing
# What a user who knows would set for the peer: the experts' ever new row counts overflow oneDNN's
# cache of 1,024 compiled matmuls, and glibc returns every large block at once (ours sets the
# latter itself, with `device.keep_memory`).
TUNED = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}
PRECISIONS = ("fp32", "autocast", "bf16")


class Worker:
    """One arm in its own process, answering JSON over a pipe."""

    def __init__(self, name, argv, request, env=None):
        self.name = name
        self.log = open(os.devnull, "w") if not os.environ.get("PEERS_LOG") else None
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.facts = self.ask(request)

    def ask(self, request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the worker ended without an answer"}
        if "error" in reply:
            raise RuntimeError(f"arm {self.name!r}: {reply['error']} (PEERS_LOG=1 shows its log)")
        return reply

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        if self.log:
            self.log.close()


def busy_seconds():
    """Processor seconds the whole machine has spent working since it started; None off Linux."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Patience:
    """Waits for a quiet machine, `seconds` in all over the run.

    torch's threads wait for one another at every operator, so half a core taken by a neighbour
    costs it ten times that: a disturbed turn measures the neighbour.
    """

    def __init__(self, seconds):
        self.left = seconds

    def wait(self):
        """Returns when others use less than QUIET cores, or when the patience is spent."""
        while self.left > 0:
            before, started = busy_seconds(), time.perf_counter()
            if before is None:
                return
            time.sleep(0.5)
            spent = time.perf_counter() - started
            if (busy_seconds() - before) / spent < QUIET:
                return
            self.left -= spent

    def turn(self, worker, steps):
        """One turn, repeated while others disturb it: wall, own and others' processor seconds."""
        best = None
        while True:
            self.wait()
            before = busy_seconds()
            reply = worker.ask({"steps": steps})
            after = busy_seconds()
            time.sleep(0.2)  # lets the arm's idle threads stop spinning
            if before is None:
                return {**reply, "others": None}
            reply["others"] = max(0.0, after - before - reply["cpu_seconds"]) / reply["seconds"]
            if best is None or reply["others"] < best["others"]:
                best = reply
            if best["others"] < QUIET or self.left <= 0:
                return best
            self.left -= reply["seconds"]


def median_and_interval(values, seed=0):
    """Median and its 95 % bootstrap interval."""
    values = np.asarray(values)
    draws = np.random.default_rng(seed).integers(0, len(values), (4000, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def interleave(workers, rounds, turn_seconds, tokens_per_step, patience):
    """Every arm's turns, `rounds` of them, in a new random order each round."""
    steps = {}
    for worker in workers:
        worker.ask({"steps": 2})
        speed = patience.turn(worker, 3)
        steps[worker.name] = max(3, round(turn_seconds * 3 / speed["seconds"]))
    turns = {worker.name: [] for worker in workers}
    order = random.Random(0)
    for number in range(rounds):
        for worker in order.sample(workers, len(workers)):
            took = patience.turn(worker, steps[worker.name])
            turns[worker.name].append(took)
            speed = steps[worker.name] * tokens_per_step / took["seconds"]
            print(f"round {number + 1}: {worker.name:22} {speed:9,.0f} tokens/s", file=sys.stderr)
    rows = []
    for worker in workers:
        mine = turns[worker.name]
        done = steps[worker.name] * tokens_per_step
        wall = [done / t["seconds"] for t in mine]
        rows.append(
            {
                "arm": worker.name,
                "params": worker.facts["params"],
                "steps_per_turn": steps[worker.name],
                "tokens_per_second": statistics.median(wall),
                "slowest": min(wall),
                "fastest": max(wall),
                "turns": wall,
                "tokens_per_cpu_second": statistics.median(done / t["cpu_seconds"] for t in mine),
                "cores": statistics.median(t["cpu_seconds"] / t["seconds"] for t in mine),
                "others": None
                if mine[0]["others"] is None
                else statistics.median(t["others"] for t in mine),
                "first_step_seconds": worker.facts["first_step_seconds"],
                "last_loss": mine[-1]["value"],
            }
        )
    return rows


def compare(rows, model, bar):
    """Ours over the peer's best arm of the same model, round by round."""
    ours = [r for r in rows if r["arm"].startswith(f"ours {model}")]
    peers = [r for r in rows if r["arm"].startswith(f"hf {model}") and "+" not in r["arm"]]
    best = max(ours, key=lambda r: r["tokens_per_second"])
    peer = max(peers, key=lambda r: r["tokens_per_second"])
    ratio = median_and_interval([a / b for a, b in zip(best["turns"], peer["turns"], strict=True)])
    cpu = best["tokens_per_cpu_second"] / peer["tokens_per_cpu_second"]
    others = max(r["others"] or 0.0 for r in (best, peer))
    met = ratio["median"] >= bar if others < NOISY else None
    outcome = {
        True: "met",
        False: "MISSED",
        None: f"UNDECIDED, other programs used {others:.1f} cores; repeat on a quiet machine",
    }
    return {
        "model": model,
        "ours": best["arm"],
        "peer": peer["arm"],
        "ratio": ratio,
        "ratio_per_cpu_second": cpu,
        "others": others,
        "bar": bar,
        "met": met,
        "verdict": f"{model}: {best['arm']} is {ratio['median']:.2f}x {peer['arm']} "
        f"({ratio['low']:.2f} to {ratio['high']:.2f}; {cpu:.2f}x per processor second), "
        f"bar {bar}x: {outcome[met]}",
    }


def torch_argv(options):
    return [options.peer_python, str(HERE / "peers_torch.py"), str(options.threads)]


def ours_argv(options):
    return [sys.executable, str(HERE / "peers_ours.py"), str(options.threads)]


def throughput(options):
    """The table of tokens/s and the verdicts on both bars."""
    rows, versions = [], {}
    patience = Patience(options.patience)
    for model in options.models:
        workers = []
        try:
            request = {"part": "throughput", "model": model}
            for precision in options.ours:
                workers.append(
                    Worker(
                        f"ours {model} {precision}",
                        ours_argv(options),
                        {**request, "precision": precision},
                    )
                )
            for precision in PRECISIONS:
                workers.append(
                    Worker(
                        f"hf {model} {precision}",
                        torch_argv(options),
                        {**request, "precision": precision},
                    )
                )
            # not in the verdict, which is about each library as it comes
            workers.append(
                Worker(
                    f"hf {model} bf16+tuned",
                    torch_argv(options),
                    {**request, "precision": "bf16"},
                    TUNED,
                )
            )
            rows += interleave(
                workers,
                options.rounds,
                options.turn_seconds,
                common.SEQ * common.BATCH,
                patience,
            )
            for worker in workers:
                versions.update(worker.facts["versions"])
        finally:
            for worker in workers:
                worker.close()
    verdicts = [compare(rows, model, BARS[model]) for model in options.models]
    return {"rows": rows, "verdicts": verdicts, "versions": versions}


def print_rows(rows):
    print(
        f"{'arm':22} {'params':>8} {'tokens/s':>9} {'slowest to fastest':>19} "
        f"{'per cpu s':>9} {'cores':>6} {'others':>6} {'first step':>10} {'loss':>7}"
    )
    for r in rows:
        others = "?" if r["others"] is None else f"{r['others']:.2f}"
        print(
            f"{r['arm']:22} {r['params'] / 1e6:7.2f}M {r['tokens_per_second']:9,.0f} "
            f"{r['slowest']:9,.0f} {r['fastest']:9,.0f} {r['tokens_per_cpu_second']:9,.0f} "
            f"{r['cores']:6.2f} {others:>6} {r['first_step_seconds']:9.1f}s {r['last_loss']:7.3f}"
        )


def device():
    """The processor's name, its cores, the system, and how busy the last minute was."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # programs wanting a core
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.platform(), "load": load}


def commit():
    """The checkout's commit, with '+' when files differ from it; None outside a checkout."""
    git = ["git", "-C", str(HERE)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def save(path, part, result):
    """Writes one part's result, keeping the other part's if the file has it."""
    path = Path(path)
    result["commit"] = commit()
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[part] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"written to {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("throughput", "shakespeare"), default="throughput")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-seconds", type=float, default=2.0)
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds to wait in all for a quiet machine"
    )
    parser.add_argument("--models", nargs="+", choices=tuple(BARS), default=list(BARS))
    parser.add_argument("--ours", nargs="+", default=["bf16"], help="our compute precisions")
    parser.add_argument("--data", help="tinyshakespeare's input.txt, for --part=shakespeare")
    parser.add_argument("--seeds", type=int, default=1, help="pairs of --part=shakespeare runs")
    parser.add_argument("--eval-every", type=int, default=100, help="steps; --part=shakespeare")
    parser.add_argument("--out", default=str(HERE.parent / "results" / "cpu_peers.json"))
    options = parser.parse_args()
    started = time.time()
    if options.part == "shakespeare":
        import shakespeare_race

        result = shakespeare_race.race(options)
    else:
        result = throughput(options)
        print_rows(result["rows"])
    result["device"] = device()
    result["threads"] = options.threads
    result["seconds"] = round(time.time() - started, 1)
    for verdict in result["verdicts"]:
        print(verdict["verdict"])
    save(options.out, options.part, result)


if __name__ == "__main__":
    main()
