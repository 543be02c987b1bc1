"""Which micro-batch each stage of a pipeline runs when: GPipe, 1F1B and ZB-H1 as tables.

A table is made before anything is traced, by plain Python. Its ticks are what the published
formulas count with: one forward pass, one backward pass or one part of it each.
"""

import dataclasses
import functools

import numpy as np

SCHEDULES = ("gpipe", "1f1b", "zero_bubble")
ASKED = ("auto", *SCHEDULES)
IDLE, FORWARD, BACKWARD, WEIGHTS = range(4)
LETTERS = ".FBW"


def chosen(asked: str, context: int = 1) -> str:
    """The schedule: auto is 1f1b, and gpipe where rows are cut along a `context` axis.

    Errors: ValueError where it cannot run so.
    """
    if context > 1 and asked in ("1f1b", "zero_bubble"):
        # seen on CPU, in MTP's shift of a row by one token
        raise ValueError(
            f"pipeline: {asked} does not run with context={context}: what neighbours along a row "
            "send each other would wait for stages that run another op; gpipe and auto do"
        )
    if asked not in ASKED:
        raise ValueError(f"pipeline: {asked!r} is not one of {', '.join(ASKED)}")
    return asked if asked != "auto" else "gpipe" if context > 1 else "1f1b"


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """One schedule of M micro-batches through S stages.

    Shapes: `op` and `micro` [T, S], which op a stage runs in a tick and of which micro-batch, -1
    where it waits. WEIGHTS is the weights' gradient where BACKWARD leaves it for later.
    """

    op: np.ndarray
    micro: np.ndarray

    @property
    def ticks(self) -> int:
        """From the first op to the last."""
        return self.op.shape[0]

    @property
    def stages(self) -> int:
        """S."""
        return self.op.shape[1]

    @property
    def idle(self) -> int:
        """Ticks that a stage waits; every stage runs as many ops, so all wait as long."""
        return int((self.op[:, 0] == IDLE).sum())

    @property
    def bubble(self) -> float:
        """Idle ticks over busy ones, as published bubbles are given."""
        return self.idle / (self.ticks - self.idle)

    def at(self, op: int, stage: int) -> np.ndarray:
        """The tick of this op at this stage, by micro-batch."""
        ticks = np.flatnonzero(self.op[:, stage] == op)
        return ticks[np.argsort(self.micro[ticks, stage])]

    @functools.cached_property
    def in_flight(self) -> tuple[int, ...]:
        """By stage, the most micro-batches whose forward has run and whose last op has not."""
        last = WEIGHTS if (self.op == WEIGHTS).any() else BACKWARD
        return tuple(_most(self.at(FORWARD, s), self.at(last, s)) for s in range(self.stages))

    @functools.cached_property
    def slots(self) -> int:
        """Stage inputs that a device must have room for: from when one is there to its BACKWARD."""
        there = [self.at(FORWARD, max(s - 1, 0)) for s in range(self.stages)]
        return max(_most(t, self.at(BACKWARD, s)) for s, t in enumerate(there))

    @functools.cached_property
    def delayed(self) -> int:
        """Micro-batches whose WEIGHTS a device must have room to keep for later; 0 without."""
        if not (self.op == WEIGHTS).any():
            return 0
        return max(_most(self.at(BACKWARD, s), self.at(WEIGHTS, s)) for s in range(self.stages))

    @functools.cached_property
    def arrives(self) -> np.ndarray:
        """[T, S]: whose stage input is there after the tick, -1 for none; the first stage makes
        its own.
        """
        sent = np.where(self.op == FORWARD, self.micro, -1)
        return np.concatenate([sent[:, :1], sent[:, :-1]], axis=1)

    @functools.cached_property
    def returns(self) -> np.ndarray:
        """[T, S]: whether the gradient of a stage's output is there after the tick."""
        sent = self.op == BACKWARD
        return np.concatenate([sent[:, 1:], np.zeros_like(sent[:, :1])], axis=1)

    @functools.cached_property
    def up(self) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """(the sets of stages that send their output on after a tick, which of them [T] does).

        Only those send who have something to send: a device waits for those that it hears from, and
        were there messages in every tick, each would take as long as its slowest op.
        """
        return _sets(self.op[:, :-1] == FORWARD, 0)

    @functools.cached_property
    def down(self) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """As `up`, of those that send their input's gradient back."""
        return _sets(self.op[:, 1:] == BACKWARD, 1)

    def seconds(self, forward: float, backward: float, weights: float = 0.0) -> float:
        """How long it takes where ops take this long and a stage waits for what it is sent."""
        takes = np.array([0.0, forward, backward, weights])
        now = np.zeros(self.stages)
        for t, row in enumerate(self.op):
            now = now + takes[row]
            then = now.copy()
            for s in self.up[0][self.up[1][t]]:
                then[s + 1] = max(then[s + 1], now[s])
            for s in self.down[0][self.down[1][t]]:
                then[s - 1] = max(then[s - 1], now[s])
            now = then
        return float(now.max())

    def __str__(self) -> str:
        """A line per stage, as papers draw it."""
        cells = [
            [LETTERS[o] + (str(m) if o else "") for o, m in zip(*row, strict=True)]
            for row in zip(self.op.T, self.micro.T, strict=True)
        ]
        width = max(len(c) for row in cells for c in row)
        return "\n".join(" ".join(c.ljust(width) for c in row).rstrip() for row in cells)


def _most(first: np.ndarray, last: np.ndarray) -> int:
    """The most that are open at once, each from its first tick to its last."""
    open_at = [int(((first <= t) & (last >= t)).sum()) for t in last]
    return max(open_at)


def _sets(sends: np.ndarray, first: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The rows of a table [T, S] of who sends, stages counted from `first`, each set once."""
    rows = [tuple(int(s) + first for s in np.flatnonzero(row)) for row in sends]
    kinds = sorted(set(rows))
    return kinds, np.array([kinds.index(row) for row in rows])


def _order(schedule: str, S: int, M: int, stage: int) -> list[int]:
    """The ops of a stage in order, up to its last FORWARD and what must come before it."""
    warm = M if schedule == "gpipe" else min(S - stage, M)
    out, after = [FORWARD] * warm, 0
    for _ in range(M - warm):
        out.append(BACKWARD)
        after += 1
        out.append(FORWARD)
        if schedule == "zero_bubble" and after > stage:  # so that no stage has more to do later
            out.append(WEIGHTS)
    return out


@functools.cache
def table(schedule: str, stages: int, microbatches: int) -> Table:
    """The schedule's table, every op as early as its order and its inputs allow.

    After its last forward pass a stage runs a BACKWARD as soon as one can, else a WEIGHTS.

    Errors: ValueError naming the schedules that there are.
    Source: 1F1B 2104.04473, section 2.2; ZB-H1 2401.10241, section 2.1.
    Differs: of ZB-H1's WEIGHTS and FORWARD the FORWARD is first. The ticks are the same, and so is
        the room that a device needs for inputs and for what waits, S micro-batches each; but the
        next stage waits for a FORWARD, and where WEIGHTS is shorter the published order loses the
        difference with every micro-batch. From FORWARD to WEIGHTS S + 1 are in flight, not S.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"pipeline: {schedule!r} is not one of {', '.join(SCHEDULES)}")
    S, M = stages, microbatches
    ops = (FORWARD, BACKWARD, *((WEIGHTS,) if schedule == "zero_bubble" else ()))
    orders = [_order(schedule, S, M, s) for s in range(S)]
    done = [dict.fromkeys(ops, 0) for _ in range(S)]
    rows: list[list[tuple[int, int]]] = []

    def ready(s: int, op: int) -> bool:
        """Whether the next micro-batch's inputs are there; `before` is of the ticks that ended."""
        m = before[s][op]
        if m == M:
            return False
        if op == FORWARD:
            return s == 0 or before[s - 1][FORWARD] > m
        if op == BACKWARD:
            return before[s][FORWARD] > m and (s == S - 1 or before[s + 1][BACKWARD] > m)
        return before[s][BACKWARD] > m

    while any(d[ops[-1]] < M for d in done):
        before, row = [dict(d) for d in done], []
        for s in range(S):
            behind = sum(done[s].values())
            wanted = orders[s][behind : behind + 1] or ops[1:]
            op = next((o for o in wanted if ready(s, o)), IDLE)
            row.append((op, before[s][op] if op else -1))
            if op:
                done[s][op] += 1
        rows.append(row)
    made = np.array(rows)
    return Table(made[:, :, 0], made[:, :, 1])
