"""A run that has weights, opened to score or to write text: what `eval` and `generate` need."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_pretrain import checkpoint, config, data, nn, phases
from sparse_pretrain.data import ngrams, tokenize
from sparse_pretrain.games import mixtures
from sparse_pretrain.model import lm
from sparse_pretrain.shapes import Batch
from sparse_pretrain.training import continuations, evaluate, record, run, tasks

TASKS = "tasks.json"  # as scaling.fit.workdirs reads it


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
    steps = record["derived"].get("steps", 0)
    # with the attention of the phase that the step belongs to: for the last, the last phase's
    definition = lm.define(phases.at(experiment.stages(steps), step).model)
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
        section = dataclasses.replace(section, source=source, mixture=mixtures.NoConfig())
        if not source.startswith("synthetic:"):
            section = dataclasses.replace(
                section, tokenizer=f"file:{opened.workdir / run.TOKENIZER}"
            )
    memory = opened.experiment.model.memory
    found = data.load(section, seed=opened.experiment.seed, memory=memory)
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


def unread(opened: Trained, tokens: int) -> tuple[Any, Iterator[Batch]]:
    """The run's data, and its next training batches: text that the run has not read.

    Units: about `tokens` positions, rounded up to whole batches. Errors: ValueError when the data
    has fewer left, or starts over at its end.
    """
    found = dataset(opened)
    total, batch = found.total_rows(), opened.experiment.data.batch
    if total is None:
        raise ValueError(
            "--unread: the run's data has no end (data.repeat, random_crop or a synthetic task): "
            "nothing is known to be unread"
        )
    if opened.experiment.data.mixture.KIND not in ("none", "fixed"):
        raise ValueError(
            f"--unread: the mixture {opened.experiment.data.mixture.KIND!r} goes by the losses of "
            "steps that were not taken: nothing is known to come next"
        )
    saved = checkpoint.folder(opened.workdir) / f"{opened.step:08d}"
    batches = found.train(checkpoint.read_meta(saved)["cursor"])
    done = batches.get_state()["rows"]
    count = -(-tokens // (batch * opened.experiment.data.seq))
    if count * batch > total - done:
        left = (total - done) * opened.experiment.data.seq
        raise ValueError(f"--unread: {tokens} tokens asked for, {left} are left after the run")
    return found, itertools.islice(batches, count)


def scores(
    opened: Trained, source: str | None = None, text: str | None = None, unread_tokens: int = 0
) -> dict[str, Any]:
    """Nats per token and bits per byte of the run's held-out split, another source's, or a text.

    With `unread_tokens`, of that much training text past the run's end.
    Errors: ValueError when there is nothing to predict.
    """
    if unread_tokens:
        found, batches = unread(opened, unread_tokens)
    elif text is None:
        found = dataset(opened, source or "")
        batches = found.heldout()
    else:  # the corpus may be gone
        from sparse_pretrain.data import pipeline

        found = pipeline.OnlyText(opened.experiment.data, tokenizer(opened))
        found.addresses = ngrams.addresses(opened.experiment.model.memory, found.tokenizer)
        batches = found.text(text)
    task = not found.tokenizer.is_text
    score = evaluate.Evaluator(opened.definition, found.domains, accuracy=task)
    result = score(opened.params, opened.prices, batches)
    if "load" in result:
        result |= evaluate.balance(result["load"]) | {"load": result["load"].tolist()}
    return result | {"step": opened.step, "manifest_hash": found.manifest.get("hash")}


def choices(opened: Trained, where: str) -> dict[str, Any]:
    """Accuracy on the multiple-choice tasks of a JSONL file, or of `heldout[:COUNT]`.

    Errors: ValueError naming the file and the line, or the count.
    """
    todo, nats = _tasks(opened, where), tasks.row_nats(opened.definition)
    section, reader = opened.experiment.data, tokenizer(opened)
    known = ngrams.addresses(opened.experiment.model.memory, reader)

    def of_rows(batch: Batch) -> Any:
        batch = batch if known is None else known.carried(batch)
        return nats(opened.params, opened.prices, batch)

    return tasks.score(
        todo,
        reader,
        of_rows,
        seq=section.seq,
        batch=section.batch,
    )


def _tasks(opened: Trained, where: str) -> list[tasks.Task]:
    name, _, text = where.partition(":")
    if name != continuations.NAME:
        return tasks.read(Path(where).expanduser())
    count = int(text) if text.isdecimal() else 0 if text else continuations.COUNT
    if count < continuations.CHOICES:
        raise ValueError(
            f"--tasks: {where!r} is not heldout:COUNT, of {continuations.CHOICES} tasks or more"
        )
    return continuations.made(dataset(opened), count)


def keep_choices(workdir: Path, where: str) -> dict[str, Any]:
    """What a finished run scores on tasks, from its tasks.json or else scored now and kept there.

    A row per group of tasks, named by the tasks and the group: accuracy, count and chance.
    Errors: ValueError as `open_run` and `choices`.
    """
    path = workdir / TASKS
    held = checkpoint.read_json(path) or {}
    found = {k: v for k, v in held.items() if v.get("from") == where}
    if not found:
        told = choices(open_run(workdir), where)
        keep = ("accuracy", "count", "chance")
        for group, row in told["per_task"].items():
            name = group or Path(where).stem
            found[name] = {k: row[k] for k in keep} | {"from": where}
        record.write_json(path, held | found)
    return found
