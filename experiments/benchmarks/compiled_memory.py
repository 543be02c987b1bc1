"""The planner's memory against the compiler's: real steps, compiled for chips that are not here.

Question: how far are the bytes per chip that `plan` estimates from those of the compiled program?
Command:  python3 experiments/benchmarks/compiled_memory.py [CASE ...], numbers from 0
Needs:    python3 -m pip install 'sparse-pretrain[compile]'
Cost:     50 to 100 s of processor time a case, under 1 GB; no accelerator.
Bar:      within 15 % on at least six cases: met, all six within 7 %; but two constants are set on
          these programs and `plan`'s own choice.
Measured: jax 0.12.0.1, GB a chip
          model        chips      plan and mesh                          compiled  estimate  error
          OLMoE        h100:8     fsdp_ep fsdp=2,expert=4                   23.47     23.23   -1 %
          Mixtral      h100:64    fsdp_ep fsdp=8,expert=8                   22.65     22.04   -3 %
          V2-Lite      h100:16    fsdp_ep fsdp=2,expert=8                   28.87     29.56   +2 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=16,expert=64,context=2    25.72     26.21   +2 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=32,expert=32,context=2    54.35     54.51   +0 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=8,expert=128,context=2    43.57     46.58   +7 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=64,expert=16,context=2    57.32     53.31   -7 %
          The last is `plan`'s own choice and compiled by the command line: 90 s of compilation,
          97 s in all, on two cores with other work beside it, at raised priority.
Learned:  since weights are gathered in bfloat16, and again in the backward pass, programs hold 2 to
          30 % less than before, and with the constants set on those (WORKING 3, KEYS 14) the six
          were off by -1, -1, +5, +7, +11 and +15.1 %. Before routers chose on each token's own
          device V3's held 97 GB where they hold 54: the partitioner gathered all scores. All are
          remat=full. Without remat `plan --config=deepseek/v3 --chips=v5p:8x16x16 --compile` chose
          fsdp=64,expert=16,context=2: 81.7 GB of 95 compiled where 67.7 were forecast (-17 %), in
          206 s of compilation, 214 s in all. KEPT is now read off that one program. `dots` has not
          been compared.
"""

import dataclasses
import sys

import jax

from sparse_pretrain import config
from sparse_pretrain.planning import chips, planner
from sparse_pretrain.planning import compile as compiler
from sparse_pretrain.sharding import mesh, plans

# configuration, chips, plan, mesh, micro-batches, rows of a batch
CASES = (
    ("olmoe_1b_7b", "h100:8", "fsdp_ep", "fsdp=2,expert=4", 2, 16),
    ("mixtral_8x7b", "h100:64", "fsdp_ep", "fsdp=8,expert=8", 2, 128),
    ("deepseek/v2_lite", "h100:16", "fsdp_ep", "fsdp=2,expert=8", 2, 64),
    ("deepseek/v3", "h800:2048", "fsdp_ep_cp", "fsdp=16,expert=64,context=2", 15, 15360),
    ("deepseek/v3", "h800:2048", "fsdp_ep_cp", "fsdp=32,expert=32,context=2", 3, 15360),
    ("deepseek/v3", "h800:2048", "fsdp_ep_cp", "fsdp=8,expert=128,context=2", 5, 15360),
)
BAR = 0.15


def main() -> int:
    """Prints a row per case; 1 when one is off by more than the bar."""
    jax.config.update("jax_platforms", "cpu")
    worst = 0.0
    for i in map(int, sys.argv[1:] or range(len(CASES))):
        name, text, plan, axes, micro, rows = CASES[i]
        experiment = config.resolve(name, [f"data.batch={rows}"])
        fleet = chips.parse(text)
        found = plans.find(plan)
        sizes = mesh.sizes(found, axes, fleet.count)
        made = planner.Planner(planner.Problem(experiment, fleet))
        ours = made.evaluate(found, sizes, micro, "full").memory_per_chip
        real = compiler.compiled(
            dataclasses.replace(experiment), fleet, plan=plan, sizes=sizes, micro=micro,
            remat="full",
        )  # fmt: skip
        error = ours / real.memory_per_chip_bytes - 1
        worst = max(worst, abs(error))
        print(
            f"{name:17s} {text:10s} {plan:11s} {axes:28s} {real.memory_per_chip_bytes / 1e9:6.2f} "
            f"{ours / 1e9:6.2f} {error:+6.1%} {real.seconds:5.0f} s",
            flush=True,
        )
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
