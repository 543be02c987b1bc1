"""`eval`: what a trained model scores."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_pretrain.commands import errors, status, with_total

EXAMPLES = """examples:
  sparse-pretrain eval --workdir=runs/quickstart
  sparse-pretrain eval --workdir=runs/quickstart --text=README.md --json
  sparse-pretrain eval --workdir=runs/quickstart --data=text_folder:notes
  sparse-pretrain eval --workdir=runs/quickstart --checkpoint=best
  sparse-pretrain eval --workdir=runs/quickstart --tasks=tasks.jsonl
  sparse-pretrain eval --workdir=runs/quickstart --tasks=heldout:400
  sparse-pretrain eval --workdir=runs/quickstart --unread=1000000

A line of the tasks is {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}.
"""
DEFAULT = "runs/quickstart"
LONG = 1024  # rows from which the loss by position is printed


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_workdir(parser)
    parser.add_argument("--text", metavar="FILE", help="score this text instead of the held-out")
    parser.add_argument("--data", metavar="SOURCE", help="score this source's held-out text")
    parser.add_argument(
        "--unread",
        metavar="TOKENS",
        type=int,
        default=0,
        help="score this much training text that the run has not read",
    )
    parser.add_argument(
        "--tasks",
        metavar="FILE",
        help="score multiple-choice tasks by likelihood: JSON lines, or heldout:COUNT, which asks "
        "for the right continuation of held-out text",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """The options that choose a run and one of its checkpoints."""
    parser.add_argument("--workdir", metavar="DIR", help=f"the run (default: {DEFAULT})")
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="last",
        help="last (default), best by held-out bits/byte, or a step",
    )


def workdir(args: argparse.Namespace) -> Path:
    """The run's folder. Errors: Usage when there is none, naming the runs that there are."""
    path = Path(args.workdir or DEFAULT).expanduser()
    if (path / "run.json").is_file():
        return path
    runs = sorted(str(f.parent) for f in Path("runs").glob("*/run.json"))
    hint = f"; there are {', '.join(runs[:8])}" if runs else "; `sparse-pretrain train` makes one"
    raise errors.Usage(f"--workdir: {str(path)!r} holds no run{hint}")


def run(args: argparse.Namespace) -> int:
    """Print the scores."""
    path = workdir(args)
    if args.text is not None and args.data is not None:
        raise errors.Usage("--text: a file is scored instead of data; give --text or --data")
    if args.unread < 0:
        raise errors.Usage(f"--unread: must not be negative, got {args.unread}")
    if args.unread and (args.text is not None or args.data is not None):
        raise errors.Usage("--unread: scores the run's own data; give it without --text and --data")
    text = None if args.text is None else read_text(args.text)
    from sparse_pretrain.training import loop, trained

    loop.run.prepare_process()
    with status(f"opening {path}"):
        opened = trained.open_run(path, args.checkpoint)
    found: dict[str, Any] = {"workdir": str(path), "name": opened.experiment.name}
    found["step"] = opened.step
    if args.tasks is not None:
        with status("scoring the tasks"):
            found["tasks"] = trained.choices(opened, args.tasks)
    if args.tasks is None or text is not None or args.data is not None or args.unread:
        with status("scoring the text"):
            try:
                found |= trained.scores(opened, args.data, text, args.unread)
            except ValueError as e:
                if text is None:
                    raise
                # the run's tokenizer cannot read it, or nothing in it can be predicted
                raise errors.Usage(f"--text: {args.text!r}: {e}") from None
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return 0


def read_text(name: str) -> str:
    """The text of a file. Errors: Usage naming the file when it is no UTF-8 text."""
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise errors.Usage(f"--text: {str(path)!r} is not UTF-8 text") from None
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        raise errors.Usage(f"--text: cannot read {str(path)!r}: {reason}") from None


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sparse_pretrain.training.progress import si

    console = Console()
    head = f"{found['name']} at step {found['step']}"
    console.print(Text(head, style="bold"))
    if "per_domain" in found:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("text")
        for name in ("bits/byte", "nats/token", "tokens"):
            table.add_column(name, justify="right")
        for name, row in with_total(found["per_domain"], found):
            bits, nats = f"{row['bits_per_byte']:.4f}", f"{row['nats_per_token']:.4f}"
            table.add_row(Text(name), bits, nats, si(row["tokens"]))
        console.print(table)
        _positions(console, found["by_position"])
    if "accuracy" in found:
        console.print(f"accuracy: {100 * found['accuracy']:.1f} %", highlight=False)
    if "max_vio_global" in found:
        vio, dead = found["max_vio_global"], found["dead_experts"]
        console.print(f"experts: MaxVio {vio:.3f}, {dead} unused", highlight=False)
    if "tasks" in found:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("tasks")
        for name in ("accuracy", "per byte", "chance", "count"):
            table.add_column(name, justify="right")
        for name, row in with_total(found["tasks"]["per_task"], found["tasks"]):
            keys = ("accuracy", "accuracy_normalised", "chance")
            shares = [f"{100 * row[k]:.1f} %" for k in keys]
            shares[0] += f" ± {196 * row['standard_error']:.1f}"
            table.add_row(Text(name), *shares, str(row["count"]))
        console.print(table)


def _positions(console: Any, rows: list[dict[str, Any]]) -> None:
    """Loss by position, where rows are long enough for it to say something."""
    if not rows or rows[-1]["to"] < LONG:
        return
    parts = (f"{row['from']}-{row['to']} {row['nats_per_token']:.3f}" for row in rows)
    console.print("nats/token by position: " + ", ".join(parts), highlight=False)
