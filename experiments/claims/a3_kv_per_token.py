"""A3: What a cache holds per token: DeepSeek-V3 beside Qwen2.5-72B and Llama-3.1-405B.

Source: 2505.09343, table 1.
Published: 70.272, 327.680 and 516.096 KB.
Kind: EXACT.
Tested: cache bytes of our models of these sizes in bfloat16, 1 KB = 1000 bytes.
Criterion: all three equal.
Cost: under a second.
Result: PASS at d4dca4e: 70.272 / 327.680 / 516.096 KB.
"""

from sparse_pretrain.claims import base, models
from sparse_pretrain.planning import flops

PUBLISHED = {"DeepSeek-V3": 70_272, "Qwen2.5-72B": 327_680, "Llama-3.1-405B": 516_096}


def measure(bench):
    """Bytes per token of every model."""
    del bench
    found = {name: flops.kv_bytes_per_token(models.MODELS[name]()) for name in PUBLISHED}
    ratio = found["Llama-3.1-405B"] / found["DeepSeek-V3"]
    return base.Outcome(
        passed=found == PUBLISHED,
        measured=" / ".join(f"{n / 1000:.3f}" for n in found.values()) + " KB",
        numbers={"bytes": found, "Llama over V3": ratio},
        analysis=f"The table's own ratio, 7.28, is {ratio:.2f} by its numbers.",
    )
