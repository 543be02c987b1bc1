"""`train`: one command from text to a trained model with a report."""

import argparse
import gc
import os
import sys
from pathlib import Path

from sparse_pretrain.commands import errors, with_total

OVERRIDES = True
EXAMPLES = """examples:
  sparse-pretrain train
  sparse-pretrain train --config=experiments/nanogpt_char.py --data=text_folder:~/shakespeare
  sparse-pretrain train --config.steps=200 --config.optim.lr=2e-3 --workdir=runs/short
  sparse-pretrain train --config.model.blocks.moe.attention.kind=full
  sparse-pretrain train --init-from=runs/quickstart --data=text_folder:notes \\
      --config.data.tokenizer=file:runs/quickstart/tokenizer.json --workdir=runs/notes
  sparse-pretrain train --init-from=runs/quickstart@best --workdir=runs/again
  sparse-pretrain train --plan=fsdp_ep --mesh=fsdp=2,expert=4 --cpu-devices=8
  sparse-pretrain train --plan=fsdp_pp --mesh=pipe=4 --pipeline=zero_bubble \\
      --config.accumulate=8 --cpu-devices=4
  sparse-pretrain train --config=engram --workdir=runs/engram
  sparse-pretrain train --config.credit.every=50 --config.credit.text=FILE --workdir=runs/worth

The same command again resumes an interrupted run. `sparse-pretrain config` lists every key.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config(parser)
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the run is written (default: runs/NAME)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no tables")
    add_devices(parser)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """The options that say which devices and processes there are."""
    group = parser.add_argument_group("devices and processes")
    group.add_argument(
        "--plan",
        metavar="NAME",
        help="how the run is spread over devices: single, ddp, zero1, fsdp, fsdp_tp, fsdp_ep, "
        "fsdp_ep_cp, fsdp_ep_pp and other products, or auto: the best that `plan` finds for these "
        "devices; short for --config.plan",
    )
    group.add_argument(
        "--mesh",
        metavar="AXIS=N,..",
        help="devices along each axis, such as fsdp=2,expert=4; rows take what is left out; "
        "short for --config.mesh",
    )
    group.add_argument(
        "--pipeline",
        metavar="NAME",
        help="how a plan's stages take turns: auto, 1f1b, zero_bubble or gpipe; short for "
        "--config.pipeline",
    )
    group.add_argument(
        "--cpu-devices", metavar="N", type=int, default=0,
        help="train on N simulated devices of this CPU, to try a plan",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", default="",
        help="where process 0 listens; SLURM, Open MPI and Kubernetes are found without",
    )
    group.add_argument("--processes", metavar="N", type=int, default=0, help="how many there are")
    group.add_argument("--process-id", metavar="I", type=int, default=-1, help="which this is")


def add_config(parser: argparse.ArgumentParser) -> None:
    """The options that choose a configuration."""
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        default="",
        help="experiment file, or the name of one that ships (default: quickstart)",
    )
    parser.add_argument(
        "--config.KEY=VALUE",
        dest="unused",
        metavar="",
        default=None,
        help="set any key of the configuration, such as --config.optim.lr=2e-3",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="python_stdlib, python_packages, text_folder:PATH, tfds:NAME or synthetic:TASK; "
        "short for --config.data.source",
    )
    parser.add_argument(
        "--init-from",
        metavar="WORKDIR[@best|@STEP]",
        help="start from the weights of another run, its last checkpoint's unless said otherwise; "
        "short for --config.init_from",
    )


def resolve(args: argparse.Namespace):
    """The experiment that the options describe; returns a config.Experiment."""
    from sparse_pretrain import config

    shorthand = []
    if args.data is not None:
        shorthand.append(f"data.source={args.data}")
    if args.init_from is not None:
        shorthand.append(f"init_from={args.init_from}")
    for name in ("plan", "mesh", "pipeline"):
        if getattr(args, name, None) is not None:
            shorthand.append(f"{name}={getattr(args, name)}")
    return config.resolve(args.config, [*shorthand, *args.overrides])


def run(args: argparse.Namespace) -> int:
    """Train, or resume."""
    if args.workdir is not None and Path(args.workdir).expanduser().is_file():
        raise errors.Usage(f"--workdir: {args.workdir!r} is a file, not a folder")
    experiment = resolve(args)

    from sparse_pretrain.training import processes

    if args.cpu_devices:
        processes.simulate(args.cpu_devices)
    processes.start(args.coordinator, args.processes, args.process_id)
    workdir = Path(args.workdir or f"runs/{experiment.name}").expanduser()

    from sparse_pretrain.report import write_report
    from sparse_pretrain.training import loop, recovery

    try:
        loop.train(experiment, workdir, args.argv, quiet=args.quiet, on_finish=write_report)
    except recovery.Abandoned as e:
        # not by the usual way out, on which threads that write a checkpoint fill the screen
        print(e, file=sys.stderr, flush=True)
        os._exit(errors.INTERRUPTED)
    except recovery.Interrupted as e:
        raise errors.Stopped(str(e), errors.INTERRUPTED) from None
    except processes.PeerLost as e:
        # not by the usual way out, on which jax waits minutes for the process that is gone
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(errors.FAILED)
    if not args.quiet and processes.lead():
        show(workdir)
    return 0


def in_process(arguments: list[str]) -> int:
    """`sparse-pretrain train` as one of many in a process: what it compiled is let go of after."""
    from sparse_pretrain import cli

    try:
        return cli.main(["train", *arguments])
    finally:
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        gc.collect()


def show(workdir: Path) -> None:
    """What a finished run reached, a sample of its text, and what to try next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sparse_pretrain.report import advice
    from sparse_pretrain.report import workdir as workdirs
    from sparse_pretrain.training.progress import clock, si

    run, console = workdirs.read(workdir), Console()
    summary = run.summary
    domains = summary.get("per_domain") or {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held out")
    for name in ("bits/byte", "nats/token", "tokens"):
        table.add_column(name, justify="right")
    *rows, total = with_total(domains, summary | {"tokens": summary.get("heldout_tokens")})
    for name, row, style in [*((*part, "") for part in rows), (*total, "bold")]:
        bits, nats = f"{row['bits_per_byte']:.4f}", f"{row['nats_per_token']:.4f}"
        table.add_row(Text(name), bits, nats, si(row["tokens"]), style=style)
    console.print()
    console.print(table)
    console.print(
        f"\n{summary['steps']} steps, {si(summary['tokens'])} tokens, {si(summary['flops'])} "
        f"FLOPs, {si(summary['tokens_per_second'])} tokens/s, {clock(summary['wall_seconds'])} in "
        f"all ({clock(summary['compile_seconds'])} compiling)",
        highlight=False,
        soft_wrap=True,
    )
    sample = summary.get("sample")
    if sample:
        console.print("\n[bold]Sample[/bold]")
        console.print(Text(sample["prompt"], style="dim") + Text(sample["text"]))
    console.print(f"\n[bold]Report[/bold]  {workdir / 'report.html'}", soft_wrap=True)
    console.print("\n[bold]What to try next[/bold]")
    for suggestion in advice.suggest(run):
        console.print(Text(f"- {suggestion.why}"), soft_wrap=True)
        if suggestion.command:
            console.print(Text(f"    {suggestion.command}", style="cyan"), soft_wrap=True)
