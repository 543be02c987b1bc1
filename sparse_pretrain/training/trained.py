"""A run that has weights, opened to score or to write text: what `eval` and `generate` need."""

import dataclasses
from pathlib import Path
from typing import Any

from sparse_pretrain import checkpoint, config, data, nn
from sparse_pretrain.data import tokenize
from sparse_pretrain.model import lm
from sparse_pretrain.training import evaluate, run, tasks


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its weights: the averaged ones where the run kept an average."""

    workdir: Path
    record: dict[str, Any]  # the content of run.json
    experiment: config.Experiment
    definition: nn.Definition
    params: Any
    prices: Any
    step: int


def open_run(workdir: Path, which: str = "last") -> Trained:
    """A checkpoint of a run: the `last`, the `best` by held-out loss, or that of a step.

    Errors: ValueError when the folder holds no run, no such checkpoint (naming those that there
    are), or a damaged one.
    """
    workdir = Path(workdir)
    record = checkpoint.read_record(workdir)
    if record is None:
        raise ValueError(f"--workdir: {str(workdir)!r} holds no run")
    experiment = config.from_config_dict(record["config"])
    try:
        step = checkpoint.Checkpointer(workdir).find(which)
    except checkpoint.CheckpointError as e:
        raise ValueError(f"--checkpoint: {e}") from None
    definition = lm.define(experiment.model)
    params, prices = checkpoint.init_from(
        workdir, definition.shapes, definition.price_shapes, step, averaged=experiment.ema > 0
    )
    return Trained(workdir, record, experiment, definition, params, prices, step)


def tokenizer(opened: Trained) -> Any:
    """The run's own tokenizer, which is in its workdir; the corpus is not looked at."""
    section = opened.experiment.data
    if section.source.startswith("synthetic:"):
        return data.load(section, seed=opened.experiment.seed).tokenizer
    return tokenize.read(opened.workdir / run.TOKENIZER, documents=section.pack == "documents")


def dataset(opened: Trained, source: str = "") -> Any:
    """The run's data, or other data read with the run's own tokenizer.

    Errors: ValueError naming both hashes when the run's data is no longer what it trained on.
    """
    section = opened.experiment.data
    if source:
        section = dataclasses.replace(section, source=source)
        if not source.startswith("synthetic:"):
            section = dataclasses.replace(
                section, tokenizer=f"file:{opened.workdir / run.TOKENIZER}"
            )
    found = data.load(section, seed=opened.experiment.seed)
    if not source:
        for name in ("hash", "tokenizer_hash"):
            then, now = opened.record["manifest"].get(name), found.manifest.get(name)
            if then != now:
                raise ValueError(
                    f"data.source: {section.source!r} is no longer what the run trained on, its "
                    f"{name} was {then} and is {now}; give --data={section.source} to score it "
                    "all the same"
                )
    if found.vocab > opened.experiment.model.vocab:
        raise ValueError(
            f"data.source: {source!r} has a vocabulary of {found.vocab}, the model of "
            f"{opened.experiment.model.vocab}"
        )
    return found


def scores(opened: Trained, source: str | None = None, text: str | None = None) -> dict[str, Any]:
    """Nats per token and bits per byte of the run's held-out split, another source's, or a text.

    Errors: ValueError when there is nothing to predict.
    """
    if text is None:
        found = dataset(opened, source or "")
        batches = found.heldout()
    else:  # the corpus may be gone
        from sparse_pretrain.data import pipeline

        found = pipeline.OnlyText(opened.experiment.data, tokenizer(opened))
        batches = found.text(text)
    score = evaluate.Evaluator(opened.definition, found.domains)
    result = score(opened.params, opened.prices, batches)
    return result | {"step": opened.step, "manifest_hash": found.manifest.get("hash")}


def choices(opened: Trained, file: Path) -> dict[str, Any]:
    """Accuracy on the multiple-choice tasks of a JSONL file.

    Errors: ValueError naming the file and the line.
    """
    todo, nats = tasks.read(file), tasks.row_nats(opened.definition)
    section = opened.experiment.data
    return tasks.score(
        todo,
        tokenizer(opened),
        lambda batch: nats(opened.params, opened.prices, batch),
        seq=section.seq,
        batch=section.batch,
    )
