"""A12: How much expert choice can tell a token of the future.

Source: 2408.15664, section 5.2 and appendix.
Published: more than K log2((1 - R) / R) bits a token; 50 bits for 9 layers of 16 experts, two
    a token.
Kind: EXACT.
Tested: the bound; and that our expert choice declares itself not causal.
Criterion: 50.53.
Cost: under a second.
Result: PASS at d4dca4e: 50.53 bits.
"""

import math

from sparse_pretrain.claims import base
from sparse_pretrain.routing import expert_choice

LAYERS, EXPERTS, TOP = 9, 16, 2


def measure(bench):
    """Bits per token."""
    del bench
    ratio = TOP / EXPERTS
    bits = LAYERS * TOP * math.log2((1 - ratio) / ratio)
    return base.Outcome(
        passed=f"{bits:.2f}" == "50.53" and not expert_choice.Config.causal,
        measured=f"{bits:.2f} bits",
        numbers={"bits": bits},
    )
