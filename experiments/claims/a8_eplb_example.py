"""A8: EPLB's placement of its worked example.

Source: deepseek-ai/EPLB, README, interface and example.
Published: two rows of 16 slots for 12 experts in 4 groups on 2 nodes of 4 GPUs.
Kind: EXACT.
Tested: our `sharding.placement.rebalance_experts` on the example's loads.
Criterion: both rows equal.
Cost: under a second.
Result: PASS at d4dca4e: 32 of 32 slots equal.
"""

import numpy as np

from sparse_pretrain.claims import base
from sparse_pretrain.sharding import placement

LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def measure(bench):
    """The expert of every slot."""
    del bench
    found = placement.rebalance_experts(LOADS, 16, 4, 2, 8)
    equal = int((found.phy2log == SLOTS).sum())
    loads = placement.device_loads(LOADS, found, 8)
    return base.Outcome(
        passed=equal == 32,
        measured=f"{equal} of 32 slots equal",
        numbers={
            "slots": found.phy2log.tolist(),
            "busiest device over the mean": (loads.max(1) / loads.mean(1)).tolist(),
        },
    )
