"""A7: Tokens that native sparse attention touches while decoding.

Source: 2502.11089, table 4.
Published: 2048, 2560, 3584 and 5632 at 8k, 16k, 32k and 64k; 4, 6.4, 9.1 and 11.6 times fewer.
Kind: EXACT.
Tested: entries, chosen blocks and window of our NSA at the settings of the paper, its defaults.
Criterion: equal with s/16 + 1024 + 512.
Cost: under a second.
Result: PASS at d4dca4e: 2048 / 2560 / 3584 / 5632.
"""

from sparse_pretrain.attention import nsa
from sparse_pretrain.claims import base

PUBLISHED = {8192: 2048, 16_384: 2560, 32_768: 3584, 65_536: 5632}
TIMES = {8192: 4.0, 16_384: 6.4, 32_768: 9.1, 65_536: 11.6}


def measure(bench):
    """Tokens at every length."""
    del bench
    c = nsa.Config()
    chosen = c.top_k * c.block + c.window
    found = {length: length // c.stride + chosen for length in PUBLISHED}
    whole = {length: (length - c.span) // c.stride + chosen for length in PUBLISHED}
    times = {length: round(length / found[length], 1) for length in found}
    return base.Outcome(
        passed=found == PUBLISHED and times == TIMES,
        measured=" / ".join(map(str, found.values())),
        numbers={"by the text's floor": whole, "times fewer": times},
        analysis="The text's own count of whole spans, floor((s - 32) / 16), gives 2 fewer; a "
        "decoder has one more than that.",
    )
