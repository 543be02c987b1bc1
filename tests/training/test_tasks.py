"""Multiple choice against a model whose likelihoods are known in closed form."""

import json
import math

import numpy as np
import pytest

from sparse_pretrain.data import tokenize
from sparse_pretrain.training import tasks

PRICE = {b: 1.0 + (b % 7) for b in range(257)}  # nats of each byte, whatever came before


def nats(batch):
    """The unigram model's nats of each row's weighted targets."""
    price = np.vectorize(PRICE.get)(batch.targets)
    return (price * batch.weights).sum(axis=1)


def cost(text):
    return sum(PRICE[b] for b in text.encode())


def test_the_likeliest_choice_wins_and_length_can_be_divided_out():
    prompt, choices = "Q:", ["aaaaaa", "c"]  # 'a' is 97, price 7; 'c' is 99, price 2
    by_sum = [cost(" " + c) for c in choices]
    assert by_sum[1] < by_sum[0]
    made = [tasks.Task(prompt, tuple(choices), int(np.argmin(by_sum)), "sum")]
    # 'bbb...': cheaper per byte (b is 98, price 1) and dearer in all than 'c'
    long = ("b" * 9, "c")
    sums = [cost(" " + c) for c in long]
    assert sums[1] < sums[0]
    assert sums[0] / 10 < sums[1] / 2
    made.append(tasks.Task(prompt, long, 0, "byte"))
    got = tasks.score(made, tokenize.Bytes(), nats, seq=64, batch=3)
    assert got["count"] == 2
    assert got["accuracy"] == 0.5
    assert got["per_task"]["byte"]["accuracy"] == 0.0
    assert got["per_task"]["byte"]["accuracy_normalised"] == 1.0
    assert got["per_task"]["sum"]["accuracy"] == 1.0
    assert got["chance"] == 0.5
    assert got["standard_error"] == pytest.approx(math.sqrt(0.25 / 2))


@pytest.mark.parametrize(
    ("prompt", "choice", "scored"),
    [
        ("Q:", "yes", " yes"),
        ("Q: ", "yes", "yes"),
        ("Q:", " yes", " yes"),
        ("", "yes", "yes"),
        ("ä", "ö", " ö"),
    ],
)
def test_only_the_choice_is_scored(prompt, choice, scored):
    tokenizer = tokenize.Bytes()
    row = tasks.row(tokenizer, prompt, choice, 64)
    assert tokenizer.decode(row.targets[row.scored]) == scored
    assert row.bytes == len(scored.encode())
    assert row.tokens[0] == tokenizer.eos
    np.testing.assert_array_equal(row.tokens[1:], row.targets[:-1])


def test_a_long_prompt_loses_its_beginning():
    row = tasks.row(tokenize.Bytes(), "x" * 100, "yes", 8)
    assert len(row.tokens) == 8
    assert bytes(row.targets.tolist()) == b"xxxx yes"
    assert row.scored.sum() == 4
    with pytest.raises(ValueError, match="a choice has 101 tokens, but a row holds 8"):
        tasks.row(tokenize.Bytes(), "Q:", "y" * 100, 8)


def test_batches_are_padded_and_hold_every_row():
    tokenizer = tokenize.Bytes()
    rows = [tasks.row(tokenizer, "p" * n, "choice", 256) for n in (1, 5, 90)]
    made = list(tasks.batches(rows, 2, 256))
    assert [b.tokens.shape for b in made] == [(2, 128), (2, 128)]
    assert sum(int((b.weights > 0).sum()) for b in made) == 3 * 7
    last = made[-1]
    assert last.segments[1].sum() == 0  # the row that fills the batch up
    n = len(rows[2].tokens)
    np.testing.assert_array_equal(last.tokens[0, :n], rows[2].tokens)
    np.testing.assert_array_equal(last.positions[0, :n], np.arange(n))
    assert last.segments[0].sum() == n


def test_reading(tmp_path):
    file = tmp_path / "t.jsonl"
    lines = [
        {"prompt": "a", "choices": ["x", "y"], "answer": 1},
        {"prompt": "b", "choices": ["x", "y", "z"], "answer": "z", "task": "second"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert tasks.read(file) == [
        tasks.Task("a", ("x", "y"), 1, ""),
        tasks.Task("b", ("x", "y", "z"), 2, "second"),
    ]


def test_a_line_of_tasks_ends_at_its_newline_only(tmp_path):
    file = tmp_path / "tasks.jsonl"
    record = {"prompt": "a\u2028b\x85c", "choices": ["x", "y"], "answer": 1}
    line = json.dumps(record, ensure_ascii=False)
    file.write_bytes((line + "\r\n" + line).encode())
    assert [task.prompt for task in tasks.read(file)] == [record["prompt"]] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ("[1]", "line 1: expected an object, got list"),
        ('{"prompt": "a", "choices": ["x", "y"]}', "line 1: answer: required"),
        ('{"prompt": 3, "choices": ["x", "y"], "answer": 0}', "prompt: expected text, got 3"),
        ('{"prompt": "a", "choices": "xy", "answer": 0}', "choices: expected a list of texts"),
        ('{"prompt": "a", "choices": ["x", ""], "answer": 0}', "choices: expected a list"),
        ('{"prompt": "a", "choices": ["x"], "answer": 0}', "choices: needs at least 2, got 1"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}', "answer: expected an index below"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": true}', "answer: expected an index"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": "z"}', "answer: expected an index"),
        ("", "holds no task"),
    ],
)
def test_reading_refuses(tmp_path, line, message):
    file = tmp_path / "t.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl") as e:
        tasks.read(file)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_reading_what_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.jsonl: no such file"):
        tasks.read(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        tasks.read(tmp_path / "b.jsonl")
