"""Time, memory and FLOPs of every attention variant against length, beside full attention's.

Question: from which length on is each variant faster than full attention, by how much at 32k, how
          do time and memory grow, and is the work that a variant states what it does?
Command:  python3 experiments/benchmarks/attention_length.py --peer-python=PYTHON_WITH_TORCH
          ... --quick                          1k to 4k only, a few minutes
          ... --kinds moba hca --lengths 16384 32768    these, and full beside them
          ... --count                          then: counts the FLOPs of what is on file
          ... --report                         table, verdicts and plot of what is on file
Method:   one layer of width 256 with 4 heads of 64 (one key head where heads share keys), one row,
          one document, bfloat16 with float32 parameters; two threads. A fresh process per variant
          and length compiles, makes its first call with the resident memory watched (the peak above
          what was there before), and stays; then the processes are asked in turn for timed calls,
          in a new random order every round. Medians over rounds; calls beyond SLOW seconds have
          fewer rounds, the first call being one of them.
          `core` is the layer less its products with weights, which are timed alone in the same
          round: whatever a variant does besides, pooling, an indexer's scores, choosing, merging,
          norms, rotary positions, is in it, by one rule for all. torch is its attention alone, the
          better of float32 and bfloat16 at each length. Time is the wall's, or with --clock=cpu
          the processor's, which a neighbour on the machine disturbs less.
          FLOPs are those of products. XLA's count takes a loop's body once, so the core's are
          counted by executed_flops.py, which walks the program with values, up to --count-to.
Measured: two cores without AMX (Intel Xeon, AVX-512 with bf16), jax 0.12.0.1, torch 2.13, under
          `chrt -r 1` beside a load of 4 to 12 (a length after the other; others took 0.94 cores at
          4k and 64k); rows in results/attention_length_no_amx.json, medians of 3 rounds up to 4k, 2
          at 8k, one from 16k on. `before` is dca8ce2 at nice -15, in another hour.
          A negative nice value alone is not enough beside niced neighbours: Linux then often keeps
          both threads on one core (processor time was wall time), and real-time priority does not.
          Core, forward and backward, over full's (22 ms at 1k, 0.56 s at 4k, 71 s at 64k):
          tokens        1k    2k    4k    8k   16k    32k    64k  before  break-even, 5x at 32k
          sliding     0.98  1.65  2.99  3.98  5.44  17.24  27.53   16.23  met, met
          hca         1.10  2.36  3.96  4.63  7.47  14.09  17.37   14.12  met, met
          moba        1.02  1.00  1.53  2.23  4.21   9.07  16.04    8.58  met, met
          csa         0.44  0.81  1.46  2.15  3.27   5.99   9.86    5.46  met, met
          nsa         0.38  0.70  1.08  1.64  2.36   4.16   6.57    4.73  met, MISSED
          dsa         0.23  0.44  0.76  0.79  1.53   2.21   3.57    2.12  MISSED, MISSED
          dsa to mla  0.31  0.51  0.82  0.85  1.53   2.02      -
          torch fp32  1.17  1.67  1.25  1.60  1.47   1.30      -
          torch bf16  0.76  0.91  0.90  0.98  0.50   0.87      -
          NSA at 32k is not settled: of the same code a run of full, nsa and dsa alone, one round,
          not on file, gave 5.32. Full at 4k was 0.28 s in a quieter hour, when nsa was 1.08 and
          dsa, before its last change, 0.57.
          Growth from 8k to 64k, time's exponent and its FLOPs', met by all: full 1.94 and 1.98,
          sliding 0.94 and 1.01, moba 0.98 and 1.04, nsa 1.26 and 1.39, dsa 1.24 and 1.56, csa 1.20
          and 1.33, hca 1.28 and 1.34.
          Peak memory, MB:
          tokens        1k    2k    4k    8k   16k    32k    64k
          full          34   115    44    71   155    300    587
          sliding       33    20    33    63   121    238    488   met
          hca           28    28    46    77   155    301    623   MISSED by 1 to 6 MB, 36 at 64k
          moba          34    30    52    85   158    313    638   MISSED from 4k on
          csa           35    47   108   137   232    444    916   MISSED but at 2k
          dsa           30    78    95   107   212    416    858   MISSED from 4k on
          nsa           45    61    98   148   279    516   1050   MISSED but at 2k
          Full's 115 at 2k: up to there its blocks of queries are unrolled (kernels_pallas/flash),
          and XLA holds the scores of several.
          Indexers choose by counting and not by a sort, heads are added up one by one (XLA:CPU
          vectorises no sum along a dim that is not the last), tiles of blocks are transposed before
          they are multiplied, parts of one softmax share its denominator, and the backward pass
          holds the queries of a quarter of the row and makes them again (attention/queries.py).
          By parts from 1,024 tokens on, medians of 3 rounds at 4k were moba 1.17, nsa 0.89, csa
          0.93, dsa 0.49, sliding 2.06 and hca 1.79, and peaks 48, 81, 68, 65, 38 and 42 MB.
          CSA and DSA held 81 and 77 MB at 4k before more products of theirs were made at once
          (kernels_pallas/indexer/xla.py); at 32k, at 82b542c, moba 426, nsa 893, csa 636, dsa 605.
          What is left at 32k: XLA sets outputs of loops to 0 before their turn (its scheduler for
          threads), block_sparse's 72 MB of partial outputs, int32 lists of chosen tokens, and
          products' own scratch, 50 to 100 MB.
          XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false lowers all alike: at 4k,
          3 rounds, full 45 to 33, nsa 101 to 80, csa 85 to 65, dsa 77 to 74, hca 50 to 47, moba 53
          to 45, sliding 35 to 33, so no verdict; time did not move beyond the noise (full 329 and
          298 ms, nsa 288 and 310). Not tried at 32k, and not set by default. Full attention too
          would hold less by parts; it has none.
          What keeps DSA from breaking even at 4k is beside the choice the gather of the tokens, and
          the sum of their gradients back, which one core does. Tried and dropped: that sum in two
          halves side by side, of the width or of the queries; scoring keys tile by tile up to the
          last that is seen. By FLOPs, dense products under the choice's mask cost what full
          attention costs, before the choice. Next: the mass of the choice out of the forward pass,
          which now gathers again for it.
          Formula FLOPs against the count at 1k: csa 0 and 3.7 %, dsa 0 and 3.3 %, forward and both
          (moba 0, nsa 3.1 % at 82b542c); not counted above 1k since. The queries that are made
          again are in no formula.
          The table below is of the code before all that, on two cores with AMX, with torch 2.13;
          rows in results/attention_length.json, moba and nsa in a second run beside full, medians
          of 3 rounds:
          tokens        1k    2k    4k    8k   16k    32k   break-even by 4k, 5x at 32k
          sliding     1.14  1.55  2.11  3.13  6.30  11.67   met, met
          hca         0.79  1.83  2.19  3.72  5.99  10.51   met, met
          moba        1.07  0.65  0.80  1.28  2.3    4.20   MISSED, MISSED
          nsa         0.25  0.53  0.64  0.96  1.6    2.97   MISSED, MISSED
          csa         0.16  0.38  0.47  0.69  1.15   1.68   MISSED, MISSED
          dsa         0.09  0.16  0.20  0.27  0.40   0.51   MISSED, MISSED (mla: 0.58)
          torch bf16  0.87  1.25  1.34  1.29  1.31   1.27   (fp32: 0.58 to 0.78)
          Growth over 8k to 32k is within the bar for all (time's exponent against its FLOPs':
          sliding 0.99 and 1.02, moba 1.12 and 1.04, nsa 1.16 and 1.32, dsa 1.48 and 1.49, csa 1.30
          and 1.30, hca 1.19 and 1.34); 64k is not measured. Formula FLOPs are within 4.9 % of the
          count. Peak memory was above full's from 4k on for all but sliding (level), at 32k 1.7
          times for moba to 3.1 for nsa; full attention holds no scores here either.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import length_common as sizes
import length_report as report
import peers_common as common
from cpu_peers import Worker, busy_seconds, commit, device
from rich.progress import Progress

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "attention_length.json"
LENGTHS = [1024 * 2**i for i in range(7)]
TURN = 0.3  # seconds that a turn lasts at least
SLOW, SLOW_ROUNDS = 8.0, 2
TORCH = ("torch fp32", "torch bf16")
PROGRAMS = (*sizes.PASSES, "linear_forward", "linear_both")


def start(kind, length, options):
    """The process of one arm, compiled and called once."""
    if kind in TORCH:
        argv = [options.peer_python, str(HERE / "length_torch.py"), str(options.threads)]
        return Worker(kind, argv, {"precision": kind.split()[1], "length": length})
    argv = [sys.executable, str(HERE / "length_ours.py"), str(options.threads)]
    return Worker(kind, argv, {"kind": kind, "length": length})


class Arm:
    """One process and its turns."""

    def __init__(self, kind, length, options):
        self.worker = start(kind, length, options)
        self.kind, self.rounds = kind, options.rounds
        first = self.worker.facts["first"]
        self.turns = {name: [] for name in (PROGRAMS if kind not in TORCH else sizes.PASSES)}
        self.calls = dict.fromkeys(self.turns, 1)
        if first["both"]["seconds"] > SLOW:  # such a call is the same the first time
            self.rounds = min(options.rounds, SLOW_ROUNDS)
            for name in sizes.PASSES:
                self.turns[name].append(first[name])

    def round(self):
        """A turn of every program that has not had all of its own."""
        for name, turns in self.turns.items():
            if len(turns) >= self.rounds:
                continue
            took = self.worker.ask({"turn": name, "calls": self.calls[name]})
            turns.append(took)
            self.calls[name] = max(1, min(200, round(TURN / took["seconds"])))


def measured(kinds, length, options, step):
    """The cells of one length: {kind: what was found}."""
    arms = []
    try:
        for kind in kinds:
            step(f"{length}: {kind} compiles")
            arms.append(Arm(kind, length, options))
        before, began = busy_seconds(), time.perf_counter()
        order, own = random.Random(length), time.process_time()
        for number in range(options.rounds):
            for arm in order.sample(arms, len(arms)):
                step(f"{length}: round {number + 1}, {arm.kind}")
                arm.round()
        spent = time.perf_counter() - began
        busy = None if before is None else busy_seconds() - before - (time.process_time() - own)
        cells = {arm.kind: cell(arm) for arm in arms}
        used = sum(
            t["cpu_seconds"] * arm.calls[n] for arm in arms for n, x in arm.turns.items() for t in x
        )
        for arm in arms:
            found = cells[arm.kind]
            found["others"] = None if busy is None else max(0.0, busy - used) / spent
        return cells
    finally:
        for arm in arms:
            arm.worker.close()


def cell(arm):
    """What one arm's file entry holds."""
    facts = {k: v for k, v in arm.worker.facts.items() if k != "first"}
    return facts | {
        "turns": {
            clock: {name: [t[clock] for t in turns] for name, turns in arm.turns.items()}
            for clock in ("seconds", "cpu_seconds")
        }
    }


def wanted(kinds, length, cells, options):
    """What has to be measured at a length: what is not on file, and full attention beside it."""
    held = cells.get(str(length), {})
    missing = [k for k in kinds if k not in held or options.fresh]
    return ["full", *(k for k in missing if k != "full")] if missing else []


def keep(cells, length, found):
    """Adds cells of one length. Each keeps the arms that it was measured beside."""
    beside = {k: v["turns"] for k, v in found.items() if k in ("full", "mla", *TORCH)}
    held = cells.setdefault(str(length), {})
    for kind, new in found.items():
        held[kind] = new | {"beside": beside, "commit": commit()}


def count(cells, lengths, options):
    """Counts the FLOPs of what is on file without; yields what it does."""
    for length in (n for n in lengths if n <= options.count_to):
        for kind, held in cells.get(str(length), {}).items():
            if kind not in TORCH and "counted" not in held:
                yield f"{length}: counting {kind}"
                worker = start(kind, length, options)
                try:
                    held["counted"] = worker.ask({"count": True})["counted"]
                    held["formula"] = worker.facts["formula"]  # of the code that is counted
                finally:
                    worker.close()


def versions_of(options):
    """Kinds that can run here: ours, and torch's where the interpreter has it."""
    import subprocess

    from sparse_pretrain import attention

    asked = options.kinds or [*attention.TABLE, *TORCH]
    unknown = [k for k in asked if k not in (*attention.TABLE, *TORCH)]
    if unknown:
        raise SystemExit(f"--kinds: {unknown[0]!r} is none of {[*attention.TABLE, *TORCH]}")
    has = subprocess.run([options.peer_python, "-c", "import torch"], capture_output=True)
    if has.returncode and any(k in TORCH for k in asked):
        print(f"no torch in {options.peer_python}: without it (--peer-python=PYTHON_WITH_TORCH)")
        asked = [k for k in asked if k not in TORCH]
    return asked


def main():
    """Measures what is not on file yet, prints the table and the verdicts, and plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--kinds", nargs="+", help="variants and 'torch fp32', 'torch bf16'")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1k to 4k")
    parser.add_argument("--fresh", action="store_true", help="measure also what is on file")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--count", action="store_true", help="only count FLOPs of what is on file")
    parser.add_argument("--count-to", type=int, default=4096, help="longest row of counted FLOPs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args()
    lengths = sorted([n for n in LENGTHS if n <= 4096] if options.quick else options.lengths)
    out = Path(options.out)
    result = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    if options.count:
        for what in count(result["cells"], lengths, options):
            print(what, flush=True)
            out.write_text(json.dumps(result) + "\n")
    elif not options.report:
        kinds = versions_of(options)
        common.use_threads(options.threads)
        todo = {n: wanted(kinds, n, result["cells"], options) for n in lengths}
        began = time.time()
        total = sum(len(k) * (options.rounds + 1) for k in todo.values())
        with Progress() as progress:
            task = progress.add_task("measuring", total=total)

            def step(what):
                progress.update(task, description=what, advance=1)

            for length, missing in todo.items():
                if not missing:
                    continue
                keep(result["cells"], length, measured(missing, length, options, step))
                result |= {"device": device(), "threads": options.threads, "commit": commit()}
                result["seconds"] = round(time.time() - began, 1)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result) + "\n")
                print(f"{length}: {', '.join(missing)} after {time.time() - began:.0f} s")
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[options.clock]
    rows = report.rows(result["cells"], clock)
    report.print_table(rows)
    result["clock"] = options.clock
    result["rows"] = rows
    result["verdicts"] = report.verdicts(rows)
    for line in result["verdicts"]:
        print(line["verdict"])
    out.write_text(json.dumps(result) + "\n")
    report.plot(rows, out.with_suffix(".png"))
    print(f"written to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
