"""`runs`: the table of runs, and what differs between two."""

import argparse
from pathlib import Path

from sparse_pretrain.commands import errors

EXAMPLES = """examples:
  sparse-pretrain runs
  sparse-pretrain runs runs/sweep --sort=tokens_per_second
  sparse-pretrain runs runs/sweep --csv=runs.csv
  sparse-pretrain runs runs/sweep --parquet=runs.parquet --price=2.5
  sparse-pretrain runs diff runs/quickstart runs/dense_baseline

The files have a row a run: results, parameters, counted FLOPs, chip-hours, device, commit, corpus,
and a column config.KEY for every key on which the runs differ. `fit --csv` reads them.
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
    parser.add_argument("--csv", metavar="FILE", help="write the table there")
    parser.add_argument(
        "--parquet", metavar="FILE", help="write the table there; needs the extra parquet"
    )
    parser.add_argument(
        "--price", type=_price, metavar="P", help="of a chip-hour; adds what each run cost"
    )


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a price")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the table, or the differences."""
    from sparse_pretrain.scaling import export, runs

    if args.what[:1] == ["diff"]:
        if len(args.what) != 3:
            raise errors.Usage(f"runs diff: takes two workdirs, got {len(args.what) - 1}")
        runs.print_diff(runs.diff(*args.what[1:]), as_json=args.json)
        return 0
    if len(args.what) > 1:
        raise errors.Usage(f"runs: takes one folder, got {len(args.what)}; or diff A B")
    # before the first run there is no folder to look into, which is no mistake
    root = Path(args.what[0]) if args.what else Path("runs")
    there = args.what or root.exists()
    rows = runs.list_runs(root, sort=args.sort, price=args.price) if there else []
    writers = {"csv": export.write_csv, "parquet": export.write_parquet}
    files = {Path(f).expanduser(): w for k, w in writers.items() if (f := getattr(args, k))}
    for file, write in files.items():
        write(rows, file)
    if args.json or not files:
        runs.print_runs(rows, as_json=args.json)
    elif files:
        from rich.console import Console

        for file in files:
            text = f"{len(rows)} runs: {file}"
            Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
