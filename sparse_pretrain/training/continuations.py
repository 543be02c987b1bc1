"""Multiple-choice tasks made of a run's own held-out text: which continuation is the right one?"""

from typing import Any

import numpy as np

from sparse_pretrain.training.tasks import Task

PROMPT, CHOICE, CHOICES = 64, 20, 4  # characters, characters, continuations to choose from
GROUP = "continuation"
NAME = "heldout"  # heldout[:COUNT] in place of a file of tasks
COUNT = 400


def made(dataset: Any, count: int = COUNT, *, seed: int = 0) -> list[Task]:
    """`count` tasks of the held-out split, the same ones for every model of its corpus.

    A prompt is PROMPT characters of a document up to a blank, and the right choice the CHOICE that
    follow, blank first; the wrong ones follow other prompts. Text that repeats, and choices that
    are mostly blanks, are not used.
    Errors: ValueError naming both numbers when the split holds too few.
    """
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for batch in dataset.heldout():
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            prompt, choice = _cut(_longest(dataset.tokenizer, tokens, segments))
            plain = len("".join(choice.split())) >= CHOICE // 2 and "\ufffd" not in prompt + choice
            if plain and prompt.strip() and prompt not in seen and choice not in seen:
                seen |= {prompt, choice}
                found.append((prompt, choice))
        if len(found) >= count:
            break
    if len(found) < count:
        raise ValueError(
            f"--tasks: {count} continuations asked for, the held-out text holds {len(found)}"
        )
    found = found[:count]
    rng = np.random.default_rng(seed)
    out = []
    for i, (prompt, right) in enumerate(found):
        others = rng.choice(count - 1, CHOICES - 1, replace=False)
        choices = [found[(i + 1 + int(j)) % count][1] for j in others]
        answer = int(rng.integers(CHOICES))
        choices.insert(answer, right)
        out.append(Task(prompt, tuple(choices), answer, GROUP))
    return out


def _cut(text: str) -> tuple[str, str]:
    """(prompt, what follows it), cut before a blank; empty where the text has no such place."""
    for at in range(PROMPT, len(text) - CHOICE + 1):
        if text[at].isspace() and not text[at - 1].isspace():
            return text[at - PROMPT : at], text[at : at + CHOICE]
    return "", ""


def _longest(tokenizer: Any, tokens: np.ndarray, segments: np.ndarray) -> str:
    """The text of a row's longest document."""
    ids, sizes = np.unique(segments[segments > 0], return_counts=True)
    if not ids.size:
        return ""
    return tokenizer.decode(tokens[segments == ids[sizes.argmax()]])
