"""The planner's memory against the compiler's: real steps, compiled for chips that are not here.

Question: how far are the bytes per chip that `plan` estimates from those of the compiled program?
Command:  python3 experiments/benchmarks/compiled_memory.py
Needs:    python3 -m pip install 'sparse-pretrain[compile]'
Cost:     50 to 100 s of processor time a case, under 1 GB; no accelerator.
Bar:      within 15 % on at least six cases: met, all within 9 %.
Measured: jax 0.12.0.1, GB a chip, on a machine with a load of 12
          model        chips      plan and mesh                          compiled  estimate  error
          OLMoE        h100:8     fsdp_ep fsdp=2,expert=4                   23.95     24.53   +2 %
          Mixtral      h100:64    fsdp_ep fsdp=8,expert=8                   22.32     22.80   +2 %
          V2-Lite      h100:16    fsdp_ep fsdp=2,expert=8                   30.02     32.66   +9 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=16,expert=64,context=2    36.97     37.32   +1 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=32,expert=32,context=2    97.17     95.21   -2 %
          DeepSeek-V3  h800:2048  fsdp_ep_cp fsdp=8,expert=128,context=2    74.76     72.50   -3 %
Learned:  the two constants of planning/layout.py were set on these cases, so this is a fit and no
          forecast, but for V2-Lite and the last. That one `plan` chose for V3; it fits 80 GB, not
          the 75 % that JAX takes by default: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95. All are
          remat=full: `none` and `dots` have not been compared.
          V3's cases took 662, 1,239 and 912 s beside that load, 95 to 106 s of them this
          process's, and 0.7 GB.
          libtpu refuses V3 on v5p:8x16x16 under fsdp_ep_tp ("Assigned barrier is not acceptable
          for opcode: ragged-all-to-all"), and fsdp_tp without remat took 525 GB there.
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
    for name, text, plan, axes, micro, rows in CASES:
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
