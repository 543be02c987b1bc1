"""A2: Parameters of eleven other releases.

Source: the releases' safetensors metadata.
Published: Qwen3-30B-A3B 30,532,122,624; Qwen3-235B-A22B 235,093,634,560; Mixtral-8x7B
    46,702,792,704; OLMoE 6,919,161,856 (active 1,282,017,280); Llama-3-8B 8,030,261,248;
    Llama-3-70B 70,553,706,496; Qwen2.5-72B 72,706,203,648; Qwen3-8B 8,190,735,360; Mistral-7B-v0.1
    7,241,732,096; DeepSeek-V2 235,741,434,880; V2-Lite 15,706,484,224.
Kind: EXACT.
Tested: our abstract models of these sizes, with what our modules lack counted beside them.
Criterion: equal.
Cost: seconds.
Result: PASS at 7bd4fe0: 11 of 11 equal, OLMoE's active 1,282,017,280.
"""

from sparse_pretrain.claims import base, models
from sparse_pretrain.planning import flops

PUBLISHED = {
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Mixtral-8x7B": 46_702_792_704,
    "OLMoE": 6_919_161_856,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Mistral-7B-v0.1": 7_241_732_096,
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V2-Lite": 15_706_484_224,
}
OLMOE_ACTIVE = 1_282_017_280


def measure(bench):
    """Totals of every model, and OLMoE's active ones."""
    del bench
    counts = {name: flops.parameters(models.MODELS[name]()) for name in PUBLISHED}
    extra = {name: count for name, (count, _) in models.EXTRA.items()}
    found = {name: c.total + extra.get(name, 0) for name, c in counts.items()}
    active = counts["OLMoE"].active_with_embedding
    differs = [name for name, total in PUBLISHED.items() if found[name] != total]
    return base.Outcome(
        passed=not differs and active == OLMOE_ACTIVE,
        measured=f"{len(PUBLISHED) - len(differs)} of {len(PUBLISHED)} equal, OLMoE's active "
        f"{active:,}",
        numbers={
            "totals": found,
            "beside our modules": {n: f"{c:,}: {what}" for n, (c, what) in models.EXTRA.items()},
        },
        analysis="Llama-2-7B, not in the list, differs from its files by 32 x 64 rotary buffers "
        "that they store.",
    )
