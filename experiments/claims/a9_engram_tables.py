"""A9: Parameters in Engram's tables.

Source: 2601.07372, tables 1 and 5; deepseek-ai/Engram, engram_demo_v1.py.
Published: 5.79B and 18.53B.
Kind: EXACT.
Tested: table 5's 2,262,400 and 7,239,680 rows (17.5 and 56 times the vocabulary of 129,280), a
    table for each of 8 heads and orders 2 and 3 at layers 2 and 15, each of prime size from there
    on, no prime twice, as in the released demo's calculate_vocab_size_across_layers; 1,280 numbers
    a token in all tables of a layer. Table 1 prints 5.7B and 18.5B, cut off, not rounded.
Criterion: within 0.5 %.
Cost: under a second.
Result: PASS at cdef768: 5.792B and 18.534B.
"""

from sparse_pretrain.claims import base
from sparse_pretrain.model import engram

VOCAB = 129_280  # DeepSeek-V3's tokenizer
ROWS = {"Engram-27B": 35 * VOCAB // 2, "Engram-40B": 56 * VOCAB}
PUBLISHED = {"Engram-27B": 5.79e9, "Engram-40B": 18.53e9}
HEADS, ORDERS, LAYERS, WIDTH = 8, (2, 3), (2, 15), 1280


def measure(bench):
    """Rows times width over all tables."""
    del bench
    found = {}
    for name, rows in ROWS.items():
        memory = engram.Config(
            layers=LAYERS, orders=ORDERS, heads=HEADS, width=WIDTH, rows=rows
        )
        found[name] = sum(map(sum, engram.tables(memory))) * memory.row_width
    off = {name: found[name] / PUBLISHED[name] - 1 for name in found}
    return base.Outcome(
        passed=all(abs(x) <= 0.005 for x in off.values()),
        measured=" and ".join(f"{n / 1e9:.3f}B" for n in found.values()),
        numbers={"parameters": found, "off": off},
    )
