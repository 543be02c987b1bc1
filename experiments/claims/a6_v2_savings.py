"""A6: What DeepSeek-V2 saves over DeepSeek 67B.

Source: 2405.04434, abstract, sections 2.1 and 3.2.3.
Published: training cost 42.5 % lower, KV cache 93.3 % smaller.
Kind: EXACT.
Tested: 172.8K against 300.6K GPU hours per trillion tokens; cache elements of our models of both
    sizes, V2's at the 6 bits it is served with.
Criterion: within 0.1 point.
Cost: under a second.
Result: PASS at d4dca4e: cost -42.51 %, cache -93.34 %.
"""

from sparse_pretrain.claims import base, models
from sparse_pretrain.planning import flops

HOURS_67B, HOURS_V2 = 300.6, 172.8  # thousand GPU hours per trillion tokens, section 3.2.3
BITS = 6  # section 3.2.3: the cache is quantised to 6 bits on average


def measure(bench):
    """Both shares."""
    del bench
    cost = 1 - HOURS_V2 / HOURS_67B
    # DeepSeek 67B (2401.02954, table 2): 95 layers, width 8192, 64 heads, 8 of them keys
    old = flops.kv_bytes_per_token(models.dense(95, 8192, 22016, 102_400, 64, 8, 128))
    new = flops.kv_bytes_per_token(models.MODELS["DeepSeek-V2"]())
    small, plain = 1 - new * BITS / 16 / old, 1 - new / old
    return base.Outcome(
        passed=abs(cost - 0.425) <= 0.001 and abs(small - 0.933) <= 0.001,
        measured=f"cost -{100 * cost:.2f} %, cache -{100 * small:.2f} %",
        numbers={
            "bytes per token at 16 bits": {"67B": old, "V2": new},
            "at 6 bits": small,
            "at 16 bits": plain,
        },
        analysis=f"At 16 bits the cache is {100 * plain:.1f} % smaller; 93.3 % needs the 6 bits.",
    )
