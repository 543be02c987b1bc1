"""`sweep`: every setting of a sweep file, or what a search in it tries, ranked."""

import argparse
from pathlib import Path

from sparse_pretrain.commands import errors

EXAMPLES = """examples:
  sparse-pretrain sweep --sweep=experiments/sweeps/quickstart_lr.py
  sparse-pretrain sweep --sweep=my_sweep.py --workdir=runs/my_sweep --workers=2
  sparse-pretrain sweep --sweep=many_tiny_runs.py --workers=4 --warm
  sparse-pretrain sweep --sweep=my_sweep.py --engine=ray --workers=16 \\
      --option=address=auto --option=gpus=1
  sparse-pretrain sweep --sweep=my_sweep.py --engine=slurm --workers=100 \\
      --option=slurm_partition=gpu --option=gpus_per_node=1 --option=timeout_min=600

The file defines get_sweep(), a list of (experiment, {key: value}); an experiment is a file or the
name of one that ships, such as "dense_baseline". sparse_pretrain.scaling.combinators makes such
lists (param, prod, chain, zipit, sample), and searches:

  from sparse_pretrain.scaling.combinators import choice, log_uniform, search

  def get_sweep():
      space = [log_uniform("optim.lr", 1e-3, 3e-2), choice("optim.kind", ["muon", "adamw"])]
      return search("quickstart", space, trials=20, sampler="tpe", pruner="asha")

The same command again skips what is finished and resumes what is not, also after the driver or a
worker was killed.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--sweep", metavar="FILE", required=True, help="the sweep file")
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the runs are written (default: runs/FILE's name)"
    )
    parser.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="runs at a time (default: 1)"
    )
    parser.add_argument(
        "--engine",
        default="local",
        metavar="NAME",
        help="local (default), or on many machines with a shared folder: ray, slurm",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the engine; local: gpus=0,1 (one for each worker). ray: address, cpus, gpus, "
        "tpus (of a run). slurm: what submitit's update_parameters takes, and cluster",
    )
    parser.add_argument(
        "--retries",
        type=_natural,
        default=1,
        metavar="N",
        help="further attempts at a run that crashed and got no further (default: 1)",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="local: a worker runs one run after the other in its process; saves seconds a run",
    )
    parser.add_argument("--json", action="store_true", help="print sweep.json when done")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _options(given: list[str]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise errors.Usage(f"--option: {text!r} is not KEY=VALUE")
    return dict(text.split("=", 1) for text in given)


def run(args: argparse.Namespace) -> int:
    """Run the sweep; 1 when a child failed."""
    import json

    from rich.console import Console

    from sparse_pretrain.scaling import engines, sweep

    file = Path(args.sweep).expanduser()
    root = Path(args.workdir or f"runs/{file.stem}").expanduser()
    if args.warm and args.engine != "local":
        raise errors.Usage(f"--warm: is of the engine local, not {args.engine}")
    engine = engines.make(
        args.engine,
        workers=args.workers,
        root=root.absolute(),
        options=_options(args.option),
        **({"warm": True} if args.warm else {}),
    )
    console = Console(stderr=True) if args.json else Console()
    record = sweep.run_sweep(
        file, root, engine, workers=args.workers, retries=args.retries, console=console
    )
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
