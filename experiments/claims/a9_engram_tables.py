"""A9: Parameters in Engram's tables.

Source: 2601.07372, table of model sizes (Engram-27B and Engram-40B).
Published: 5.79B and 18.53B.
Kind: EXACT.
Tested: a table for each of 8 heads and two orders of n-gram at two layers, each of prime size from
    2,262,400 (7,239,680) rows on, no prime twice; 1,280 numbers a token in all tables of a layer.
Criterion: within 0.5 %.
Cost: under a second.
Result: PASS at d4dca4e: 5.792B and 18.534B.
"""

from sparse_pretrain.claims import base

ROWS = {"Engram-27B": 2_262_400, "Engram-40B": 7_239_680}
PUBLISHED = {"Engram-27B": 5.79e9, "Engram-40B": 18.53e9}
HEADS, ORDERS, LAYERS, WIDTH = 8, 2, 2, 1280


def primes(start, count):
    """The first `count` primes from `start` on."""
    found, n = [], start
    while len(found) < count:
        if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)):
            found.append(n)
        n += 1
    return found


def measure(bench):
    """Rows times width over all tables."""
    del bench
    tables = HEADS * ORDERS * LAYERS
    each = WIDTH // (HEADS * ORDERS)
    found = {name: sum(primes(rows, tables)) * each for name, rows in ROWS.items()}
    off = {name: found[name] / PUBLISHED[name] - 1 for name in found}
    return base.Outcome(
        passed=all(abs(x) <= 0.005 for x in off.values()),
        measured=" and ".join(f"{n / 1e9:.3f}B" for n in found.values()),
        numbers={"parameters": found, "off": off},
    )
