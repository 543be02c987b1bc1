"""Multiple choice by likelihood: the choice the model finds likeliest after the prompt."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_pretrain import nn, shapes
from sparse_pretrain.training import loss

BUCKET = 64  # row lengths are multiples of it, so that few programs are compiled


class Task(NamedTuple):
    """A prompt, what may follow it, the index of what does, and the group it is reported in."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    group: str


class Row(NamedTuple):
    """One choice after its prompt. Shapes: [n]; `scored` marks the targets that belong to it."""

    tokens: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    bytes: int


def read(path: Path) -> list[Task]:
    """The tasks of a JSONL file: {"prompt": str, "choices": [str, ...], "answer": index or text}.

    `task` in a line names its group, which is scored apart; lines without one are the group ''.
    Errors: ValueError naming the file, the line and the field.
    """
    try:
        # not splitlines, which also cuts at separators that a JSON string may hold, such as U+2028
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise ValueError(f"--tasks: cannot read {path}: {(e.strerror or str(e)).lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--tasks: {path} is not UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_task(json.loads(line)))
            except ValueError as e:
                raise ValueError(f"--tasks: {path}, line {number}: {e}") from None
    if not found:
        raise ValueError(f"--tasks: {path} holds no task")
    return found


def _task(record: Any) -> Task:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    for name in ("prompt", "choices", "answer"):
        if name not in record:
            raise ValueError(f"{name}: required, keys are {', '.join(record) or 'none'}")
    prompt, choices, answer = record["prompt"], record["choices"], record["answer"]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt: expected text, got {prompt!r}")
    if not (isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)):
        raise ValueError(f"choices: expected a list of texts, got {choices!r}")
    if len(choices) < 2:
        raise ValueError(f"choices: needs at least 2, got {len(choices)}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    ok = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    if not ok:
        raise ValueError(f"answer: expected an index below {len(choices)}, or a choice's text, got "
                         f"{answer!r}")  # fmt: skip
    return Task(prompt, tuple(choices), answer, str(record.get("task", "")))


def row(tokenizer: Any, prompt: str, choice: str, seq: int) -> Row:
    """The prompt and a choice as one row; a long prompt loses its beginning.

    A blank is put between them unless one of them has it. A token that straddles the border counts
    as the choice's, since it is there that the choices differ.
    Errors: ValueError when the choice alone exceeds `seq` tokens.
    """
    glue = "" if not prompt or prompt[-1:].isspace() or choice[:1].isspace() else " "
    ids, widths = tokenizer.spans(prompt + glue + choice)
    scored = np.cumsum(widths) > len(prompt.encode())
    if tokenizer.eos is not None:
        ids, scored = np.append(tokenizer.eos, ids), np.append(False, scored)
    tokens, targets, scored = ids[:-1], ids[1:], scored[1:]
    if not scored.any():
        raise ValueError(f"--tasks: nothing of the choice {choice!r} can be predicted")
    if scored.sum() > seq:
        raise ValueError(
            f"--tasks: a choice has {int(scored.sum())} tokens, but a row holds {seq}: "
            f"{choice[:40]!r}..."
        )
    return Row(tokens[-seq:], targets[-seq:], scored[-seq:], len((glue + choice).encode()))


def batches(rows: Sequence[Row], size: int, seq: int) -> Iterator[shapes.Batch]:
    """The rows as padded batches of `size` rows."""
    longest = max(len(r.tokens) for r in rows)
    length = min(seq, -(-longest // BUCKET) * BUCKET)
    for start in range(0, len(rows), size):
        ints = np.zeros((4, size, length), np.int32)
        weights = np.zeros((size, length), np.float32)
        for i, r in enumerate(rows[start : start + size]):
            n = len(r.tokens)
            ints[:, i, :n] = r.tokens, r.targets, np.ones(n), np.arange(n)
            weights[i, :n] = r.scored
        tokens, targets, segments, positions = ints
        zeros = np.zeros_like(tokens)
        yield shapes.Batch(tokens, targets, segments, positions, weights, zeros, zeros)


def row_nats(definition: nn.Definition) -> Callable[..., jax.Array]:
    """The jitted (params, prices, batch) -> nats of each row's weighted targets, [B]."""

    @jax.jit
    def nats(params, prices, batch):
        model = definition.merge(params, prices)
        hidden, _ = model(batch)
        _, each = loss.token_losses(model, hidden, batch)
        return (each * batch.weights).sum(axis=1)

    return nats


def score(
    tasks: Sequence[Task],
    tokenizer: Any,
    nats: Callable[[shapes.Batch], Any],
    *,
    seq: int,
    batch: int,
) -> dict[str, Any]:
    """Accuracy in total and per group: by likelihood, and by likelihood per byte of the choice.

    `nats` gives each row's negative log-likelihood. `chance` is what guessing reaches.
    Source: the accuracies named acc and acc_norm in EleutherAI's lm-evaluation-harness.
    """
    rows = [row(tokenizer, t.prompt, c, seq) for t in tasks for c in t.choices]
    total = np.concatenate([np.asarray(nats(b), np.float64) for b in batches(rows, batch, seq)])
    cost, width, start = total[: len(rows)], np.array([r.bytes for r in rows]), 0
    right: dict[str, list[tuple[bool, bool, float]]] = {}
    for task in tasks:
        end = start + len(task.choices)
        plain = int(np.argmin(cost[start:end])) == task.answer
        per_byte = int(np.argmin(cost[start:end] / width[start:end])) == task.answer
        right.setdefault(task.group, []).append((plain, per_byte, 1 / len(task.choices)))
        start = end
    groups = {name: _accuracy(answers) for name, answers in right.items()}
    return _accuracy([a for answers in right.values() for a in answers]) | {"per_task": groups}


def _accuracy(answers: Sequence[tuple[bool, bool, float]]) -> dict[str, Any]:
    n = len(answers)
    plain, per_byte, chance = (sum(column) / n for column in zip(*answers, strict=True))
    return {
        "count": n,
        "accuracy": plain,
        "accuracy_normalised": per_byte,
        "standard_error": math.sqrt(plain * (1 - plain) / n),
        "chance": chance,
    }
