"""A run that has weights, opened to score or to write text: what `eval` and `generate` need."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_pretrain import checkpoint, config, data, nn
from sparse_pretrain.model import lm
from sparse_pretrain.training import evaluate, tasks

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its weights (the averaged ones where the run kept an average), and its data."""

    workdir: Path
    experiment: config.Experiment
    dataset: Any
    definition: nn.Definition
    params: Any
    prices: Any
    step: int


def open_run(workdir: Path, *, source: str = "") -> Trained:
    """The latest checkpoint of a run, with its data or, given a `source`, other data.

    Other data is read with the run's own tokenizer.
    Errors: ValueError when the folder holds no run or no checkpoint, or the data is another than
    the weights were trained on (no `source`), naming both hashes.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"--workdir: there is no folder {str(workdir)!r}")
    record = checkpoint.read_json(workdir / "run.json")
    if record is None:
        raise ValueError(f"--workdir: {str(workdir)!r} holds no run")
    experiment = config.from_config_dict(record["config"])
    section = experiment.data
    if source:
        section = dataclasses.replace(section, source=source)
        if section.tokenizer != "bytes" and (workdir / TOKENIZER).exists():
            section = dataclasses.replace(section, tokenizer=f"file:{workdir / TOKENIZER}")
    dataset = data.load(section, seed=experiment.seed)
    _same("vocab", experiment.model.vocab, dataset.vocab)
    if not source:
        for name in ("tokenizer_hash", "hash"):
            _same(name, record["manifest"].get(name), dataset.manifest.get(name))
    definition = lm.define(experiment.model)
    saver = checkpoint.Checkpointer(workdir, **experiment.checkpoint.to_dict())
    step = saver.latest()
    if step is None:
        raise ValueError(f"--workdir: {str(workdir)!r} holds no checkpoint yet")
    params, prices = checkpoint.init_from(workdir, definition.shapes, definition.price_shapes)
    return Trained(workdir, experiment, dataset, definition, params, prices, step)


def _same(name: str, run: Any, here: Any) -> None:
    if run != here:
        raise ValueError(
            f"data.{name}: the run has {run!r}, the data here {here!r}; give --data=SOURCE to use "
            "other data"
        )


def scores(run: Trained, text: str | None = None) -> dict[str, Any]:
    """Nats per token and bits per byte of the held-out split (all of it), or of a text.

    Errors: ValueError when the text holds nothing to predict.
    """
    domains = run.dataset.domains if text is None else ("text",)
    batches = run.dataset.heldout() if text is None else run.dataset.text(text)
    found = evaluate.Evaluator(run.definition, domains)(run.params, run.prices, batches)
    return found | {"step": run.step}


def choices(run: Trained, file: Path) -> dict[str, Any]:
    """Accuracy on the multiple-choice tasks of a JSONL file.

    Errors: ValueError naming the file and the line.
    """
    nats = tasks.row_nats(run.definition)
    section = run.experiment.data
    return tasks.score(
        tasks.read(file),
        run.dataset.tokenizer,
        lambda batch: nats(run.params, run.prices, jax.tree.map(jnp.asarray, batch)),
        seq=section.seq,
        batch=section.batch,
    )
