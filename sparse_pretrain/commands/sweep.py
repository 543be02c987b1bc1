"""`sweep`: every setting of a sweep file, one after the other, ranked."""

import argparse
from pathlib import Path

from sparse_pretrain.commands import errors

EXAMPLES = """examples:
  sparse-pretrain sweep --sweep=experiments/sweeps/quickstart_lr.py
  sparse-pretrain sweep --sweep=my_sweep.py --workdir=runs/my_sweep

The file defines get_sweep(), a list of (experiment, {key: value}); an experiment is a file or the
name of one that ships, such as "dense_baseline". The same command again skips what is finished and
resumes what is not.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--sweep", metavar="FILE", required=True, help="the sweep file")
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the runs are written (default: runs/FILE's name)"
    )
    parser.add_argument("--json", action="store_true", help="print sweep.json when done")


def run(args: argparse.Namespace) -> int:
    """Run the sweep; 1 when a child failed."""
    import json

    from rich.console import Console

    from sparse_pretrain.scaling import sweep

    file = Path(args.sweep).expanduser()
    root = Path(args.workdir or f"runs/{file.stem}").expanduser()
    console = Console(stderr=True) if args.json else Console()
    record = sweep.run_sweep(file, root, console=console)
    if args.json:
        print(json.dumps(record, indent=1, default=str))
    if record["interrupted"]:
        raise errors.Stopped(
            "interrupted; the same command continues the sweep", errors.INTERRUPTED
        )
    failed = [c["label"] for c in record["children"] if c["status"] == "failed"]
    if failed:
        total = len(record["children"])
        raise errors.Stopped(f"{len(failed)} of {total} runs failed, the first: {failed[0]}")
    return 0
