"""`runs`: the table of runs, and what differs between two."""

import argparse
from pathlib import Path

from sparse_pretrain.commands import errors

EXAMPLES = """examples:
  sparse-pretrain runs
  sparse-pretrain runs runs/sweep --sort=tokens_per_second
  sparse-pretrain runs diff runs/quickstart runs/dense_baseline
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "what", nargs="*", metavar="DIR", help="folder of runs (default: runs), or `diff A B`"
    )
    parser.add_argument(
        "--sort", default="bits_per_byte", metavar="COLUMN", help="default: bits_per_byte"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the differences."""
    from sparse_pretrain.scaling import runs

    if args.what[:1] == ["diff"]:
        if len(args.what) != 3:
            raise errors.Usage(f"runs diff: takes two workdirs, got {len(args.what) - 1}")
        runs.print_diff(runs.diff(*args.what[1:]), as_json=args.json)
        return 0
    if len(args.what) > 1:
        raise errors.Usage(f"runs: takes one folder, got {len(args.what)}; or diff A B")
    # before the first run there is no folder to look into, which is no mistake
    root = Path(args.what[0]) if args.what else Path("runs")
    rows = runs.list_runs(root, sort=args.sort) if args.what or root.exists() else []
    runs.print_runs(rows, as_json=args.json)
    return 0
