"""`config`: what a configuration resolves to and what it costs, before any training."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from sparse_pretrain.commands import train

OVERRIDES = True
EXAMPLES = """examples:
  sparse-pretrain config
  sparse-pretrain config --config=dense_baseline --config.model.repeats=8
  sparse-pretrain config --json | python3 -m json.tool
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    train.add_config(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Print the configuration and the numbers that follow from it."""
    experiment = train.resolve(args)
    numbers = costs(experiment)
    if args.json:
        print(json.dumps({**numbers, "config": experiment.to_dict()}, indent=1))
        return 0
    _show(experiment.to_dict(), numbers)
    return 0


def costs(experiment: Any) -> dict[str, Any]:
    """The derived numbers of `run.json`, from the configuration alone.

    A length that only the data knows (an epoch) is None.
    """
    import dataclasses

    from sparse_pretrain import config
    from sparse_pretrain.training import run

    size = vocab(experiment)
    model = dataclasses.replace(experiment.model, vocab=size)
    experiment = dataclasses.replace(experiment, model=model)
    steps, per_step = experiment.steps_of(0), experiment.tokens_per_step
    numbers = run.derive(experiment, config.Run(steps, steps * per_step, per_step))
    if not steps:
        numbers |= dict.fromkeys(("steps", "tokens", "flops"))
    kinds = sorted({layer.attention.KIND for layer in model.layer_list})
    return numbers | {"vocab": size, "kv_format": f"{model.dtype}, {' and '.join(kinds)}"}


def vocab(experiment: Any) -> int:
    """The vocabulary's size: the model's, else what the tokenizer's name says, else the data's."""
    from sparse_pretrain import data

    return experiment.model.vocab or data.vocab(experiment.data, seed=experiment.seed)


def _show(values: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sparse_pretrain.training.progress import si

    console = Console()
    for line, dim in _lines(values):
        console.print(Text(line, style="bold" if dim else ""), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", style="dim")

    def row(what: str, value: Any, unit: str, text: str | None = None) -> None:
        table.add_row(what, "-" if value is None else text or si(value), unit)

    row("parameters", numbers["total_params"], "in all")
    row("active", numbers["active_params"], "per token, without the input embedding")
    row("active with embedding", numbers["active_params_with_embedding"], "per token")
    row("vocabulary", numbers["vocab"], "tokens", str(numbers["vocab"]))
    row("steps", numbers["steps"], "optimizer steps (- is one epoch)", str(numbers["steps"]))
    row("tokens", numbers["tokens"], "training targets")
    row("training", numbers["train_flops_per_token"], "FLOPs per token")
    row("executed", numbers["executed_flops_per_token"], "FLOPs per token, masked work included")
    for phase in numbers.get("phases", []):
        unit = f"FLOPs per token from step {phase['first_step']}, rows of {phase['seq']}"
        row(f"  {phase['name']}", phase["train_flops_per_token"], unit)
    row("whole run", numbers["flops"], "FLOPs")
    row("cache", numbers["kv_bytes_per_token"], f"bytes per token, {numbers['kv_format']}")
    for what, size in numbers["memory_bytes"].items():
        row(f"memory, {what}", size, "bytes, estimated")
    console.print(table)


def _lines(values: Mapping[str, Any], indent: str = ""):
    """(line, whether it opens a section) of every value, nested by indentation."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:", True
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_shown(value)}", False


def _shown(value: Any) -> str:
    """A value as an override would give it; quoted where its ends would not be seen."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    text = str(value)
    return text if text and text == text.strip() and text.isprintable() else repr(text)
