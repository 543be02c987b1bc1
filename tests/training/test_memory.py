"""A run whose model has a memory: exact resume, scoring, and text written by the same rows."""

import json
import shutil

import jax
import numpy as np
import pytest

from sparse_pretrain import checkpoint, config, shapes
from sparse_pretrain.data import ngrams
from sparse_pretrain.interop import generate
from sparse_pretrain.model import engram
from sparse_pretrain.training import loop, tasks, trained

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in an order of their own."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeFGH"), 4)) for _ in range(20)]
    for i in range(6):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)))
    return folder


def experiment(folder, **changes):
    """Two dense layers of a few thousand parameters, a memory before each."""
    dense = {"attention": {"kind": "full", "heads": 2}, "ffn": {"kind": "dense", "hidden": 16}}
    values = {
        "name": "remembers", "steps": STEPS,
        "data": {"source": f"text_folder:{folder}", "tokenizer": "bytes", "seq": 32, "batch": 4},
        "model": {"width": 16, "blocks": {"dense": dense}, "pattern": ["dense"], "repeats": 2,
                  "memory": {"layers": [0, 1], "heads": 2, "width": 16, "rows": 100},
                  "dtype": "float32"},
        "optim": {"kind": "muon", "lr": 0.01}, "checkpoint": {"every": 3, "keep": 9},
        "eval": {"tokens": 128}, "sample": {"tokens": 0},
    }  # fmt: skip
    return config.from_config_dict(values | changes)


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_not_and_writes_text_by_the_same_rows(text, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    summary = loop.train(experiment(text), whole, [], quiet=True)
    shutil.copytree(whole, again)
    shutil.rmtree(checkpoint.folder(again) / f"{STEPS:08d}")
    (again / "summary.json").unlink()
    assert loop.train(experiment(text), again, [], quiet=True)["bits_per_byte"] == (
        summary["bits_per_byte"]
    )
    ours, theirs = (
        [
            [json.loads(line)[k] for k in ("loss", "grad_norm")]
            for line in (w / "metrics.jsonl").read_text().splitlines()
        ]
        for w in (again, whole)
    )
    assert ours == theirs
    a, b = (trained.open_run(w) for w in (again, whole))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    early = trained.open_run(whole, "3").params
    tables = engram.tables(b.experiment.model.memory)
    for place, sizes in enumerate(tables):  # it learns, but for rows that nothing points to
        name = f"memory_{place}"
        moved = np.abs(b.params[name]["table"] - early[name]["table"]).max(1) > 0
        assert moved[: sum(sizes)].mean() > 0.2
        assert not moved[sum(sizes) :].any()
    # written greedily, every byte is the likeliest after those before it, by the host's rows
    reader = trained.tokenizer(b)
    prompt = "abcd "
    wrote = generate.generate(
        b.definition, b.params, b.prices, reader, prompt, tokens=12, temperature=0
    )
    ids = np.concatenate([[reader.eos], reader.encode(prompt + wrote)])[None].astype(np.int32)
    ones, place = np.ones_like(ids), np.arange(ids.shape[1])[None]
    batch = shapes.Batch(ids, ids, ones, place, ones.astype(np.float32), ones, 0 * ones)
    batch = ngrams.addresses(b.experiment.model.memory, reader).carried(batch)

    @jax.jit
    def likeliest(params, batch):
        model = b.definition.merge(params, b.prices)
        return (model(batch)[0] @ model.head_weight()[0]).argmax(-1)

    start = len(reader.encode(prompt))
    np.testing.assert_array_equal(likeliest(b.params, batch)[0, start:-1], ids[0, start + 1 :])
    # scored text and tasks carry rows too
    scores = trained.scores(b, text="abcd FGHa " * 9)
    assert 0 < scores["nats_per_token"] < 6
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": "ab", "choices": ["cd", "FG"], "answer": 0}))
    assert trained.choices(b, str(file))["count"] == 1
    assert tasks.read(file)
