"""A5: What training DeepSeek-V3 cost.

Source: 2412.19437, table 1 and section 1.
Published: 2664K + 119K + 5K = 2788K H800 hours, $5.576M at $2; 180K hours and 3.7 days per trillion
    tokens on 2048 GPUs.
Kind: EXACT.
Tested: the arithmetic, and the share of the H800's bfloat16 rate that it implies with our count of
    the model's FLOPs.
Criterion: equal, days to the printed digit.
Cost: under a second.
Result: PASS at d4dca4e: 2788K h, $5.576M, 180K h and 3.66 days per trillion.
"""

from sparse_pretrain.claims import base, models
from sparse_pretrain.planning import chips, flops

HOURS = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
TOKENS, GPUS, DOLLARS = 14.8e12, 2048, 2.0


def measure(bench):
    """Hours, dollars, days."""
    del bench
    hours = sum(HOURS.values())
    each = HOURS["pre-training"] / (TOKENS / 1e12)
    days = each / GPUS / 24
    work = flops.train_flops_per_token(models.MODELS["DeepSeek-V3"](), 4096).model
    rate = work * TOKENS / (HOURS["pre-training"] * 3600)
    found = {
        "hours": hours,
        "dollars": hours * DOLLARS,
        "hours per trillion tokens": each,
        "days per trillion tokens": days,
        "train FLOPs per token at 4096": work,
        "FLOP/s per GPU": rate,
        "share of the bfloat16 peak": rate / chips.CHIPS["h800"].bf16,
    }
    passed = hours == 2_788_000 and hours * DOLLARS == 5_576_000 and each == 180_000
    passed = passed and f"{days:.1f}" == "3.7"
    return base.Outcome(
        passed=passed,
        measured=f"{hours / 1000:.0f}K h, ${hours * DOLLARS / 1e6:.3f}M, {each / 1000:.0f}K h and "
        f"{days:.2f} days per trillion",
        numbers=found,
    )
