"""Tasks made of held-out text: the right choice is what follows, and no other is."""

import types

import numpy as np
import pytest

from sparse_pretrain.data import tokenize
from sparse_pretrain.training import continuations, tasks


def held(texts, seq=128):
    """A dataset whose held-out rows are these texts."""
    tokenizer = tokenize.Bytes()
    rows = [np.frombuffer(text.encode(), np.uint8)[:seq].astype(np.int32) for text in texts]
    tokens = np.stack([np.pad(row, (0, seq - len(row))) for row in rows])
    segments = np.stack([np.pad(np.ones(len(row), np.int32), (0, seq - len(row))) for row in rows])
    batch = types.SimpleNamespace(tokens=tokens, segments=segments)
    return types.SimpleNamespace(heldout=lambda: iter([batch]), tokenizer=tokenizer)


def line(i):
    return " ".join(f"word{i}x{j}" for j in range(20))


def test_the_right_choice_follows_its_prompt_and_the_wrong_ones_others():
    texts = [line(i) for i in range(12)]
    made = continuations.made(held(texts), 12)
    assert made == continuations.made(held(texts), 12)
    for task in made:
        whole = [text for text in texts if task.prompt + task.choices[task.answer] in text]
        assert len(whole) == 1
        assert sum(task.prompt + choice in whole[0] for choice in task.choices) == 1
        assert len(set(task.choices)) == 4
        assert len(task.prompt) == 64
        assert all(len(choice) == 20 for choice in task.choices)
        # nothing is put between them
        row = tasks.row(tokenize.Bytes(), task.prompt, task.choices[0], 128)
        assert tokenize.Bytes().decode(row.targets[row.scored]) == task.choices[0]
    assert len({task.answer for task in made}) > 1


def test_text_that_repeats_or_is_blank_makes_no_task():
    texts = [line(1), line(1), " " * 128, "x" * 128, line(2)[:70], *(line(i) for i in range(2, 7))]
    assert len(continuations.made(held(texts), 6)) == 6
    with pytest.raises(ValueError, match="7 continuations asked for, the held-out text holds 6"):
        continuations.made(held(texts), 7)
