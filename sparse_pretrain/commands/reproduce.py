"""`reproduce`: runs published claims to their verdicts."""

import argparse
import time
from pathlib import Path

from sparse_pretrain.commands import errors

EXAMPLES = """examples:
  sparse-pretrain reproduce --section=A
  sparse-pretrain reproduce a3_kv_per_token
  sparse-pretrain reproduce C3 C4 --scale=h200
  sparse-pretrain reproduce --all

Section A takes seconds, B minutes and public data, C trains: an hour or two on two cores in all.
The same command again goes on where it stopped and leaves out what this code has measured.
`sparse-pretrain claims` shows all verdicts.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims, by id or name")
    parser.add_argument("--all", action="store_true", help="every claim")
    parser.add_argument("--section", choices=("A", "B", "C"), help="every claim of a section")
    parser.add_argument(
        "--scale",
        choices=("laptop", "h200"),
        default="laptop",
        help="size of what is trained (default: laptop, a CPU's)",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure anew, removing these claims' earlier runs"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", default="runs/claims", help="of runs (default: runs/claims)"
    )
    parser.add_argument("--results", metavar="DIR", help="default: those of this installation")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Run them; 0 whatever the verdicts, for a FAIL is a result."""
    if bool(args.names) + bool(args.all) + bool(args.section) != 1:
        raise errors.Usage("reproduce: give names of claims, --section or --all")
    from rich.console import Console

    from sparse_pretrain.claims import base, ledger, reproduce, results
    from sparse_pretrain.training import loop, recovery

    known = base.load()
    chosen = base.choose(args.names, known) if args.names else list(known.values())
    if args.section:
        chosen = [claim for claim in chosen if claim.section == args.section]
    where = Path(args.results).expanduser() if args.results else results.folder()
    loop.run.prepare_process()
    if args.scale == "h200":
        import jax

        platform = jax.devices()[0].platform
        if platform == "cpu":
            raise errors.Usage(
                f"--scale: h200 is for an accelerator, the device here is {platform}"
            )
    console = Console(stderr=args.json)
    began = time.perf_counter()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    runs = Path(args.workdir).expanduser()
    try:
        done = reproduce.run_all(chosen, where, runs, scale=args.scale, again=args.again, say=say)
    except (recovery.Interrupted, KeyboardInterrupt):
        raise errors.Stopped(
            "interrupted; the same command goes on from here", errors.INTERRUPTED
        ) from None
    total = {v: sum(d.verdict == v for d in done) for v in base.VERDICTS}
    say(
        ", ".join(f"{n} {v}" for v, n in total.items()) + f" in {time.perf_counter() - began:.0f} s"
    )
    if any(not d.skipped and d.result for d in done):
        report = where / ("REPORT.md" if args.scale == "laptop" else f"REPORT.{args.scale}.md")
        report.write_text(ledger.report(known, where, args.scale), encoding="utf-8")
        say(f"report: {report}")
    if args.json:
        print(reproduce.as_json(done))
    return 0
