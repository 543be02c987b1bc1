"""Time to the loss that nanoGPT's CPU recipe reaches in torch, for our trainer; see cpu_peers.py.

The target is measured in the same run: torch trains the recipe to its end and is scored on the
whole held-out tenth. Both clocks run from the start of the process: imports, data, compilation
and, on our side, the evaluations on the way. A smoke test of the trainer, not a claim.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cpu_peers

# config/train_shakespeare_char.py with the arguments that nanoGPT's README gives for a CPU
RECIPE = {
    "layers": 4,
    "heads": 4,
    "width": 128,
    "block": 64,
    "batch": 12,
    "steps": 2000,
    "lr": 1e-3,
    "final_lr": 1e-4,
    "warmup": 100,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "clip": 1.0,
}
PUBLISHED = 1.88


def torch_run(options, seed):
    """The recipe in torch: seconds from the start of its process to its last step, and its loss."""
    started = time.perf_counter()
    request = {
        "part": "shakespeare",
        "recipe": RECIPE,
        "path": str(Path(options.data).resolve()),
        "seed": seed,
    }
    worker = cpu_peers.Worker("nanogpt torch", cpu_peers.torch_argv(options), request)
    try:
        before = cpu_peers.busy_seconds()
        trained = worker.ask({"steps": RECIPE["steps"]})
        seconds = time.perf_counter() - started
        others = others_share(before, trained["cpu_seconds"], trained["seconds"])
        loss = worker.ask({"evaluate": True})["value"]
        facts = worker.facts
    finally:
        worker.close()
    return {
        "seconds": seconds,
        "train_seconds": trained["seconds"],
        "loss": loss,
        "others": others,
        "params": facts["params"],
        "heldout_characters": facts["heldout_characters"],
        "versions": facts["versions"],
    }


def others_share(before, own, seconds):
    """Cores that other processes used meanwhile."""
    if before is None:
        return None
    return max(0.0, cpu_peers.busy_seconds() - before - own) / seconds


def our_run(options, seed, folder):
    """`sparse-pretrain train` on the recipe: its held-out losses and when each was known.

    The caches are empty, so that the time holds the corpus and the compilation.
    """
    source, workdir, cache = (folder / name for name in ("text", "run", "cache"))
    source.mkdir(parents=True)
    shutil.copy(options.data, source / "input.txt")
    command = [
        sys.executable,
        "-m",
        "sparse_pretrain",
        "train",
        "--quiet",
        "--config=nanogpt_char",
        f"--data=text_folder:{source}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.eval.every={options.eval_every}",
        "--config.sample.tokens=0",
    ]
    environment = {**os.environ, "SPARSE_PRETRAIN_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    log = folder / "log"
    known = {}
    with log.open("w") as out:
        before, started = cpu_peers.busy_seconds(), time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while process.poll() is None:
            time.sleep(0.02)
            for row in evaluations(workdir):
                known.setdefault(row["step"], time.perf_counter() - started)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {log.read_text().strip().splitlines()[-1]}")
    summary = json.loads((workdir / "summary.json").read_text())
    curve = [
        {"step": r["step"], "loss": r["nats_per_token"], "seconds": known.get(r["step"], seconds)}
        for r in evaluations(workdir)
    ]
    busy = None if before is None else cpu_peers.busy_seconds() - before
    return {
        "curve": curve,
        "loss": summary["nats_per_token"],
        "heldout_tokens": summary["heldout_tokens"],
        "compile_seconds": summary["compile_seconds"],
        "train_seconds": summary["train_seconds"],
        "seconds": seconds,
        "machine_cpu_seconds": busy,
        "params": summary["total_params"],
        "command": " ".join(command[1:]),
    }


def evaluations(workdir):
    """The complete rows of eval.jsonl so far."""
    path = workdir / "eval.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def race(options):
    """Pairs of runs, torch and ours in turn; the time each needed to torch's loss of that pair."""
    if not options.data or not Path(options.data).is_file():
        raise SystemExit(
            f"--data: {options.data!r} is no file; give tinyshakespeare's input.txt "
            "(github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt)"
        )
    pairs = []
    for seed in range(options.seeds):
        peer = torch_run(options, seed)
        with tempfile.TemporaryDirectory() as folder:
            ours = our_run(options, seed, Path(folder))
        reached = next((r for r in ours["curve"] if r["loss"] <= peer["loss"]), None)
        pair = {"seed": seed, "torch": peer, "ours": ours, "reached": reached}
        pairs.append(pair)
        print(
            f"seed {seed}: torch {peer['loss']:.4f} nats after {peer['seconds']:.1f} s "
            f"({peer['params'] / 1e6:.2f}M parameters); ours "
            + (
                f"{reached['loss']:.4f} after {reached['seconds']:.1f} s, step {reached['step']}"
                if reached
                else f"only {ours['loss']:.4f} after {ours['seconds']:.1f} s"
            )
            + f" ({ours['params'] / 1e6:.2f}M, {ours['compile_seconds']:.1f} s compiling)"
        )
    target = statistics.fmean(p["torch"]["loss"] for p in pairs)
    times = [p["reached"]["seconds"] if p["reached"] else float("inf") for p in pairs]
    mine, theirs = statistics.median(times), statistics.median(p["torch"]["seconds"] for p in pairs)
    met = mine != float("inf")
    text = (
        f"shakespeare: torch reaches {target:.4f} nats (published {PUBLISHED}) in {theirs:.1f} s; "
        + (f"ours is there in {mine:.1f} s" if met else "ours does NOT get there")
    )
    seconds = mine if met else None
    verdict = {"verdict": text, "met": met, "target": target, "ours": seconds, "torch": theirs}
    return {"recipe": RECIPE, "pairs": pairs, "verdicts": [verdict]}
