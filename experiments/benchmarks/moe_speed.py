"""Training tokens/s of the quickstart's mixture over its dense baseline, by size.

Question: at equal active FLOPs, from which width or batch on does the mixture keep 0.8 of the
          dense model's tokens/s on this machine?
Command:  python3 experiments/benchmarks/moe_speed.py
Method:   both arms of experiments/quickstart.py and dense_baseline.py, every hidden width scaled
          with the model's, real batches, one step of each in turn in one process, after some steps
          in which the router settles. The ratio is that of the median seconds; its interval is
          bootstrapped over pairs.
Measured: two Xeon cores without AMX, jax 0.12.0.1, at a181fed, nothing beside it but half a
          minute of compiling and an installation during the last row; two Zen cores without AMX,
          before experts had homes (grouped_matmul/layout.py), beside other work
          width  tokens a step  Xeon                  Zen                   rounds
          256    8,192          0.795 [0.774, 0.802]  0.789 [0.766, 0.799]  15
          256    16,384         0.727 [0.677, 0.737]  0.797 [0.774, 0.835]  15, 11
          256    32,768         0.700 [0.666, 0.737]  0.870 [0.817, 0.897]  15, 9
          At the quickstart's own size, 8,192, it is MISSED (with AMX it has 0.79 to 0.83), and from
          which size on it holds depends on the machine. Before uneven loads were multiplied in wide
          blocks: 0.754 at 8,192 in the same half hour as Zen's; 0.74, 0.72 (width 128), 0.70 (width
          512) and 0.757 at 32,768 tokens earlier.
          On the Xeon the mixture's rate falls with the batch, 3,370 to 2,590 tokens/s, where the
          dense model's falls from 4,200 to 3,660. A part of it was memory that each step gave back
          and took anew, above 1 GB of scratch: kept since (kernels_pallas.device.keep_memory), not
          measured on an idle machine again. Whether homes cost more than they save at thousands of
          rows an expert is not known.
Learned:  of the quickstart's steps two in five had a layer with an expert more than a quarter above
          its share, whose products took the slow way. Gate and up as one product, weights applied
          before the last product, and dots of whole rows for the weights' gradients are no faster.
          Next: Muon on the experts (55 ms of a step), and the sixth of the rows that is padding.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np
from cpu_peers import commit, device, median_and_interval
from peers_common import use_threads
from rich.progress import track

from sparse_pretrain import config
from sparse_pretrain.training import run, state, step

RESULTS = Path(__file__).parents[1] / "results" / "moe_speed.json"
BAR = 0.8
ARMS = ("quickstart", "dense_baseline")
MOE = "model.blocks.moe.ffn.hidden"


def overrides(arm: str, width: int, batch: int) -> list[str]:
    """The arm at this width and rows a step: hidden widths and heads' dims as multiples."""
    hidden = width * 3 // 4  # an expert's; a token has three and the shared one
    if arm == "dense_baseline":
        hidden = -(-(4 * hidden + -(-16 // 3)) // 8) * 8
    values = {
        "model.width": width,
        "data.batch": batch,
        "model.blocks.first.ffn.hidden": 3 * width,
        MOE: hidden,
        "steps": 1000,
        "tokens": 0,
        "data.repeat": True,
    }
    for block in ("first", "moe"):
        at = f"model.blocks.{block}.attention."
        values |= {at + "heads": width // 64, at + "kv_rank": width // 4}
    return [f"{k}={json.dumps(v) if not isinstance(v, bool) else v}" for k, v in values.items()]


class Arm:
    """One model in training."""

    def __init__(self, name: str, width: int, batch: int):
        p = run.prepare(config.resolve(name, overrides(name, width, batch)))
        self.tokens, self.flops = p.run.tokens_per_step, p.derived["train_flops_per_token"]
        self.state = state.create(p.definition, p.tx, 0, ema=False)
        self.batches = p.dataset.train()
        made = step.make_train_step(p.definition, p.experiment.model, p.tx, schedule=p.schedule)
        self.batch = next(self.batches)
        self.step = made.lower(self.state, self.batch).compile()

    def once(self) -> float:
        """Seconds of one step, metrics read."""
        began = time.perf_counter()
        self.state, out = self.step(self.state, self.batch)
        jax.block_until_ready(out)
        seconds = time.perf_counter() - began
        self.batch = next(self.batches)
        return seconds


def measured(width: int, batch: int, settle: int, rounds: int) -> dict:
    """The ratio at one width and batch."""
    arms = {name: Arm(name, width, batch) for name in ARMS}
    for _ in range(settle):
        arms["quickstart"].once()
    arms["dense_baseline"].once()
    times = {name: [] for name in ARMS}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name].append(arm.once())
    rates = {name: arms[name].tokens / np.median(t) for name, t in times.items()}
    pairs = [d / m for m, d in zip(*(times[n] for n in ARMS), strict=True)]
    found = median_and_interval(pairs)
    row = {"width": width, "tokens_per_step": arms["quickstart"].tokens, "rounds": rounds}
    row["ratio"] = found["median"]
    row |= {k: found[k] for k in ("low", "high")}
    row |= {f"{n}_tokens_per_second": float(r) for n, r in rates.items()}
    return row | {f"{n}_flops_per_token": arms[n].flops for n in ARMS}


def main() -> None:
    """Prints a row per width and writes experiments/results/moe_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="rows of 256 tokens")
    parser.add_argument("--settle", type=int, default=25, help="steps of the mixture before timing")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    use_threads(2)
    run.prepare_process()
    rows = []
    cases = list(itertools.product(options.widths, options.batches))
    for width, batch in track(cases, "measuring"):
        row = measured(width, batch, options.settle, options.rounds)
        rows.append(row)
        print(
            f"width {width}, {row['tokens_per_step']} tokens a step: "
            f"mixture {row['quickstart_tokens_per_second']:.0f} tokens/s, dense "
            f"{row['dense_baseline_tokens_per_second']:.0f}, ratio {row['ratio']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]: {'met' if row['ratio'] >= BAR else 'MISSED'}"
        )
    result = {"bar": BAR, "rows": rows, "commit": commit(), "jax": jax.__version__, **device()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
