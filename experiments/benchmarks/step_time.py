"""The planner's step time against measured steps on this machine's processor.

Question: does the cost model that is fitted to clusters say what a step takes on a CPU, with
          constants of its own?
Command:  python3 experiments/benchmarks/step_time.py [CONFIG ...]
Cost:     about four minutes of processor time, most of it compilation.
Bar:      five configurations within 25 %, each predicted by a fit to the other four.
Method:   the real step on random tokens, best of several; peak and memory rate measured in the same
          process, before and after. `by FLOPs` is the error of a guess at the others' mean rate,
          which the model has to beat. The optimizer's time is not in it. Times are processor
          seconds over the number of cores, which a busy neighbour disturbs less than wall seconds;
          both are printed.
Measured: jax 0.12.0.1, two Zen cores, at raised priority beside other work (load 10): met
          configuration         measured predicted  error  by FLOPs   wall
          quickstart             1.339 s     1.217   -9 %      +1 %  1.642
          dense_baseline         1.045       1.104   +6 %     +37 %  1.271
          olmoe_1b_7b:tiny       0.231       0.183  -21 %     -31 %  0.280
          mixtral_8x7b:tiny      0.170       0.191  +13 %     +13 %  0.264
          deepseek/v3:tiny       0.177       0.204  +16 %      -7 %  0.266
          An earlier run, with products allowed above the peak: 14 % at worst. Wall seconds are of a
          shared machine.
Learned:  products at the whole peak and 21 times the bytes explain these models: at this size a
          step waits for memory. Next: on an idle machine, and on a GPU.
"""

import dataclasses
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

from kernels_pallas import device
from sparse_pretrain import config, optim, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, cost, work
from sparse_pretrain.training import state, step

CONFIGS = (
    "quickstart", "dense_baseline", "olmoe_1b_7b:tiny", "mixtral_8x7b:tiny", "deepseek/v3:tiny",
)  # fmt: skip
BAR, STEPS, VOCAB = 0.25, 4, 4096


def measured(name: str) -> tuple[work.Work, int, float, float]:
    """(work per token, tokens of a step, processor seconds over cores, wall seconds)."""
    experiment = config.resolve(name)
    model = dataclasses.replace(experiment.model, vocab=VOCAB)
    definition = lm.define(model)
    section = experiment.optim
    tx = optim.TABLE[section.KIND].build(section, definition.dims, lambda _: jnp.float32(1e-3))
    run = step.make_train_step(definition, model, tx, schedule=lambda _: jnp.float32(1e-3))
    draw = np.random.default_rng(0)
    params, prices = (
        jax.tree.map(lambda x: jnp.asarray(0.02 * draw.normal(size=x.shape), x.dtype), like)
        for like in (definition.shapes, definition.price_shapes)
    )
    opt = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params))
    now = state.TrainState(jnp.int32(0), params, opt, prices, {}, {}, jax.random.key(0))
    rows, length = experiment.data.batch, experiment.data.seq
    tokens = draw.integers(0, VOCAB, (rows, length)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    weights = ones.astype(np.float32)
    batch = shapes.Batch(tokens, tokens, ones, positions, weights, ones, 0 * ones)
    now, told = run(now, batch)
    jax.block_until_ready(told)
    best = []
    for _ in range(STEPS):
        wall, busy = time.perf_counter(), time.process_time()
        now, told = run(now, batch)
        jax.block_until_ready(now)
        best.append((time.process_time() - busy, time.perf_counter() - wall))
    cores = os.cpu_count() or 1
    busy, wall = min(best)
    return work.of(model, definition, length), rows * length, busy / cores, wall


def rates() -> tuple[float, float]:
    """(FLOP/s of a bfloat16 product, bytes/s of a sum), by processor seconds over cores."""
    x, y = jnp.ones((1024, 1024), jnp.bfloat16), jnp.ones((1 << 25,), jnp.float32)
    product, total = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1.0)
    cores = os.cpu_count() or 1

    def best(call, a):
        jax.block_until_ready(call(a))
        found = []
        for _ in range(8):
            busy = time.process_time()
            jax.block_until_ready(call(a))
            found.append(time.process_time() - busy)
        return min(found) / cores

    return 2 * 1024**3 / best(product, x), 8 * (1 << 25) / best(total, y)


def fitted(rows, chip) -> cost.Constants:
    """The two constants that fit these measured steps best."""

    def made(x):
        return dataclasses.replace(cost.Constants(), products=np.exp(x[0]), traffic=np.exp(x[1]))

    def rest(x):
        return [np.log(predicted(r, chip, made(x)) / r[2]) for r in rows]

    # no product is faster than the peak
    return made(least_squares(rest, [np.log(0.5), np.log(10.0)], bounds=((-5, -5), (0, 8))).x)


def by_flops(row, others) -> float:
    """Seconds of a step if they went by FLOPs alone, at the mean rate of other steps."""
    rates = [np.log(r[2] / (r[1] * r[0].flops)) for r in others]
    return float(row[1] * row[0].flops * np.exp(np.mean(rates)))


def predicted(row, chip: chips.Chip, constants: cost.Constants) -> float:
    """Seconds of a step."""
    return row[1] * sum(cost.computing(row[0], chip, "bf16", constants, spread=False))


def main() -> int:
    """Prints the table; 1 when the bar is missed."""
    device.keep_memory()
    names = sys.argv[1:] or CONFIGS
    first = rates()
    rows = []
    for name in names:
        rows.append(measured(name))
        print(f"{name}: {rows[-1][2]:.3f} s, wall {rows[-1][3]:.3f}", file=sys.stderr, flush=True)
    last = rates()
    peak, stream = (max(a, b) for a, b in zip(first, last, strict=True))
    chip = chips.Chip("cpu", (), peak, 0, 8e9, stream, stream, stream, 1, 0, 0, "measured here")
    print(f"peak {peak / 1e9:.0f} GFLOP/s, memory {stream / 1e9:.1f} GB/s")
    print(f"{'configuration':20s} {'tokens':>6s} measured predicted  error by FLOPs   wall")
    worst = 0.0
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        others = [r for j, r in enumerate(rows) if j != i]
        ours = predicted(row, chip, fitted(others, chip))
        error, plain = (seconds / row[2] - 1 for seconds in (ours, by_flops(row, others)))
        worst = max(worst, abs(error))
        print(
            f"{name:20s} {row[1]:6d} {row[2]:8.3f} {ours:9.3f} {error:+6.1%} {plain:+8.1%} "
            f"{row[3]:6.3f}"
        )
    whole = fitted(rows, chip)
    print(f"fit to all: products {whole.products:.3f}, traffic {whole.traffic:.2f}")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
