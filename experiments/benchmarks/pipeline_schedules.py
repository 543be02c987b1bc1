"""Pipeline schedules against each other: ticks by formula and by table, and the compiled memory.

Question: what do GPipe, 1F1B and ZB-H1 wait, and what does a device hold under each?
Command:  python3 experiments/benchmarks/pipeline_schedules.py --micro=16
Needs:    no accelerator; devices are simulated, so nothing here is a time.
Cost:     10 to 20 s a row; --ticks-only none.
Measured: jax 0.12.0.1, CPU, a dense model of 8 layers of width 128, 512 tokens a micro-batch in
          float32, remat none; XLA_FLAGS=--xla_backend_optimization_level=0. Idle ticks over busy
          ones, micro-batches from FORWARD to the last op, the compiler's temporaries of a device:
          schedule      S   M  ticks  formula  bubble  in flight  temporary, MB
          gpipe         2  16     34       34   0.062         16          56.64
          1f1b          2  16     34       34   0.062          2          44.77
          zero_bubble   2  16     49       49   0.021          3         120.41
          gpipe         4  16     38       38   0.188         16          41.90
          1f1b          4  16     38       38   0.188          4          29.50
          zero_bubble   4  16     51       51   0.062          5          86.20
          gpipe         8  16     46       46   0.438         16          30.03
          1f1b          8  16     46       46   0.438          8          15.45
          zero_bubble   8  16     55       55   0.146          9          66.57
          With 4 micro-batches at S=4 GPipe holds 32.41 MB, 1F1B 29.50 as with 16.
Learned:  1F1B waits what GPipe waits and holds less, the more micro-batches the less: it is the
          default. ZB-H1 waits a third and holds two to four times as much: both sides of the
          products for weights of up to S micro-batches, 2,560 numbers a token and layer here, where
          a stage that recomputes keeps 128 a stage. In lockstep, a message every tick, a tick would
          last as long as its slowest op, 1F1B (F 1, B 3) 1.4 to 1.5 times GPipe's step; with
          messages only where there is something to send both take (M + S - 1)(F + B).
          The published order of ZB-H1 loses F - W with every micro-batch where W is shorter than F;
          ours does not (ticks.table, Differs). planning/layout.py has PILES and DELAYED from here.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp

from sparse_pretrain import config, optim, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.sharding import apply, mesh, plans, ticks
from sparse_pretrain.training import state, step

EXAMPLES = """examples:
  python3 experiments/benchmarks/pipeline_schedules.py
  python3 experiments/benchmarks/pipeline_schedules.py --stages=4 --micro=8,32 --ticks-only
  python3 experiments/benchmarks/pipeline_schedules.py --schedules=1f1b,zero_bubble --model=moe
"""
MODELS = {
    "dense": dict(
        attention=dict(kind="full", heads=4, kv_heads=4, head_dim=32),
        ffn=dict(kind="dense", hidden=512),
    ),
    "moe": dict(
        attention=dict(kind="mla", heads=4, q_rank=64, kv_rank=64, nope_dim=32, rope_dim=16,
                       v_dim=32),
        ffn=dict(kind="moe", experts=8, top_k=2, hidden=128, shared=1,
                 router=dict(kind="sigmoid_bias", rate=0.01, balance=0.01)),
    ),
}  # fmt: skip


def busy(schedule: str, stages: int, micro: int) -> tuple[int, int]:
    """(ticks, idle ticks) by the published formulas, every op one tick; ZB-H1's needs M >= S.

    Source: 2104.04473, section 2.2; 2401.10241, section 2.3.
    """
    wait = stages - 1 if schedule == "zero_bubble" else 2 * (stages - 1)
    if schedule == "zero_bubble" and micro < stages:
        wait += stages - micro
    return (3 if schedule == "zero_bubble" else 2) * micro + wait, wait


def compiled(name: str, schedule: str, stages: int, micro: int, args: argparse.Namespace):
    """The compiler's memory of a step on simulated devices, one row a micro-batch, and seconds."""
    began = time.perf_counter()
    values = dict(
        name="bench", steps=1, accumulate=micro,
        data=dict(source="synthetic:copy", seq=args.seq, batch=micro),
        model=dict(width=args.width, vocab=args.vocab, dtype="float32", pattern=("layer",),
                   blocks=dict(layer=MODELS[name]), repeats=args.layers, remat=args.remat),
        optim=dict(kind="adamw"),
    )  # fmt: skip
    experiment = config.from_config_dict(values)
    model = experiment.model
    definition = lm.define(model)

    def rate(count):
        del count
        return jnp.asarray(1e-3, jnp.float32)

    tx = optim.TABLE["adamw"].build(experiment.optim, definition.dims, rate)
    plan = plans.find("ddp_pp")
    laid = mesh.make(plan, f"pipe={stages}", jax.devices()[:stages])
    placed = apply.Placed(plan, laid, micro, pipeline=schedule)
    placed.check(definition, rows=micro, length=args.seq)
    like = state.abstract(definition, tx, ema=False, placed=placed)
    fields = dict.fromkeys(shapes.Batch._fields, jnp.int32) | {"weights": jnp.float32}
    batch = shapes.Batch(
        **{f: jax.ShapeDtypeStruct((micro, args.seq), d) for f, d in fields.items()}
    )
    run = step.make_train_step(
        definition, model, tx, schedule=rate, accumulate=micro, placed=placed
    )
    program = run.lower(like, placed.like_batch(batch)).compile()
    return program.memory_analysis(), time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    """Prints a row per schedule, number of stages and number of micro-batches."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--stages", default="2,4,8", metavar="S,..")
    parser.add_argument("--micro", default="4,16", metavar="M,..", help="micro-batches of a step")
    parser.add_argument("--schedules", default=",".join(ticks.SCHEDULES), metavar="NAME,..")
    parser.add_argument("--model", choices=tuple(MODELS), default="dense")
    parser.add_argument("--remat", choices=lm.REMAT, default="none")
    for field, value in (("layers", 8), ("width", 128), ("seq", 512), ("vocab", 256)):
        parser.add_argument(f"--{field}", type=int, default=value, metavar="N")
    parser.add_argument("--ticks-only", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(map(int, args.stages.split(","))))
    print(f"jax {jax.__version__}")
    print("schedule      S   M  ticks  formula  bubble  in flight  temporary, MB  seconds")
    for stages in map(int, args.stages.split(",")):
        for micro in map(int, args.micro.split(",")):
            for schedule in args.schedules.split(","):
                table = ticks.table(schedule, stages, micro)
                text = (
                    f"{schedule:11s} {stages:3d} {micro:3d} {table.ticks:6d} "
                    f"{busy(schedule, stages, micro)[0]:8d} {table.bubble:7.3f} "
                    f"{max(table.in_flight):10d}"
                )
                if not args.ticks_only:
                    memory, seconds = compiled(args.model, schedule, stages, micro, args)
                    text += f" {memory.temp_size_in_bytes / 1e6:14.2f} {seconds:8.1f}"
                print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
