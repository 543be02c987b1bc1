"""Schedules that fetch: experts' weights follow the tokens that a device has too many of."""

import math

import numpy as np
from jaxtyping import Int

from sparse_pretrain.sharding.schedule import Load, Schedule, even, made

# LLEP's settings (2601.17111, its repository's example): spill once the busiest device is 1.3
# times the mean, and no piece below 1,024 of the 131,072 pairs that a device has on average.
SPILL_ABOVE, PIECES = 1.3, 128


def least_loaded(
    load: Load,
    holds: Int[np.ndarray, "E D"],
    *,
    threshold: float = SPILL_ABOVE,
    least: int | None = None,
    capacity: float = 1.0,
) -> Schedule:
    """Even, until the busiest device passes `threshold`: then excess and weights are spilled.

    A device gives what it has above `capacity` times the mean, from its fullest expert, to the
    least loaded device, which fetches the expert unless it holds it. Pieces below `least` pairs
    (default: the mean load / 128) stay where they are.
    Source: LLEP (2601.17111): lambda is `threshold`, alpha `capacity`, m `least`.
    Differs: devices give in the order of their load, LLEP goes through the experts; starts from any
    placement.
    """
    start = even(load, holds)
    if start.max_over_mean <= threshold:
        return start
    tokens, loads = start.tokens.copy(), start.load.astype(np.int64)
    mean = loads.mean()
    rows = math.ceil(capacity * mean)
    least = max(1, int(mean) // PIECES if least is None else least)
    giving = loads > rows
    while giving.any():
        giver = int(np.argmax(np.where(giving, loads, -1)))
        taker = int(np.argmin(loads))
        expert = int(np.argmax(tokens[:, giver]))
        piece = min(loads[giver] - rows, rows - loads[taker], tokens[expert, giver])
        if piece < least:  # no piece of this device is larger
            giving[giver] = False
            continue
        _move(tokens, loads, expert, giver, taker, piece)
        giving[giver] = loads[giver] > rows
    return made(tokens, holds)


def _move(tokens, loads, expert, giver, taker, piece):
    tokens[expert, giver] -= piece
    tokens[expert, taker] += piece
    loads[giver] -= piece
    loads[taker] += piece


def row_budget(load: Load, holds: Int[np.ndarray, "E D"], *, slots: int | None = None) -> Schedule:
    """At most ceil(pairs / devices) rows on every device, by hot experts in prefetch slots.

    A device below the budget is filled by one device above it, with that one's fullest experts, as
    in an alias table: each is filled once, and by a giver that has not been filled. So `slots` as
    many as the experts of a device (the default) always suffice and `overflow` is 0. With fewer,
    the better of that plan and of the largest pieces first is taken, and what lies above the budget
    is computed where it was and counted in `overflow`; another plan may have less.
    Units: `slots` experts that a device can fetch per batch.
    Source: MoonEP (Kimi K3's report, 5.2.1) for the budget; Walker's alias method for the plan.
    """
    start = even(load, holds)
    if slots is None:
        slots = int((holds > 0).sum(0).max())
    if slots < 0:
        raise ValueError(f"slots: must not be negative, got {slots}")
    rows = -(-int(start.load.sum()) // holds.shape[1])
    plan = _alias(start.tokens.copy(), holds, rows, slots)
    if _above(plan, rows):
        plan = min(
            plan,
            _largest_pieces(start.tokens.copy(), holds, rows, slots),
            key=lambda tokens: _above(tokens, rows),
        )
    return made(plan, holds, _above(plan, rows))


def _above(tokens_ExD, rows: int) -> int:
    return int(np.maximum(tokens_ExD.sum(0) - rows, 0).sum())


def _alias(tokens, holds, rows: int, slots: int):
    loads = tokens.sum(0)
    unfilled = np.ones(len(loads), bool)
    while loads.max() > rows:
        waiting = unfilled & (loads < rows)
        if not waiting.any():
            break
        taker = int(np.argmin(np.where(waiting, loads, rows)))
        giver = int(np.argmax(loads))
        unfilled[taker] = False
        free = slots
        for expert in np.argsort(-tokens[:, giver], kind="stable"):
            piece = min(rows - loads[taker], tokens[expert, giver])
            fetch = holds[expert, taker] == 0
            if piece <= 0:
                break
            if fetch and not free:
                continue
            free -= int(fetch)
            _move(tokens, loads, expert, giver, taker, piece)
    return tokens


def _largest_pieces(tokens, holds, rows: int, slots: int):
    loads = tokens.sum(0)
    free = np.full(len(loads), slots)
    here = holds > 0
    open_ = np.ones(len(loads), bool)
    while loads.max() > rows and (open_ & (loads < rows)).any():
        taker = int(np.argmin(np.where(open_, loads, rows)))
        piece = np.minimum(tokens, np.maximum(loads - rows, 0))
        piece = np.minimum(piece, rows - loads[taker])
        if not free[taker]:
            piece = np.where(here[:, taker, None], piece, 0)
        expert, giver = np.unravel_index(int(np.argmax(piece)), piece.shape)
        if piece[expert, giver] < 1:
            open_[taker] = False
            continue
        free[taker] -= int(not here[expert, taker])
        here[expert, taker] = True
        _move(tokens, loads, expert, giver, taker, piece[expert, giver])
    return tokens
