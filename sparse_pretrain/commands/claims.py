"""`claims`: the ledger of published claims and what became of them here."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  sparse-pretrain claims
  sparse-pretrain claims --section=A
  sparse-pretrain claims --json
  sparse-pretrain claims --readme=README.md

EXACT claims compare a number, REFIT ones fit published raw results, DIRECTION ones are runs of our
own, far smaller than the paper's: their sign and order are tested, their size is not.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--section", choices=("A", "B", "C"), help="only these")
    parser.add_argument(
        "--scale", choices=("laptop", "h200"), default="laptop", help="of the trained ones"
    )
    parser.add_argument("--results", metavar="DIR", help="default: those of this installation")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--markdown", action="store_true", help="as the README shows it")
    parser.add_argument(
        "--report", action="store_true", help="write REPORT.md and each file's Result anew"
    )
    parser.add_argument(
        "--readme", metavar="FILE", help="write the table between this file's two marks"
    )


def run(args: argparse.Namespace) -> int:
    """Print the ledger."""
    import dataclasses
    import json

    from sparse_pretrain.claims import base, ledger, results

    where = Path(args.results).expanduser() if args.results else results.folder()
    known = base.load()
    table = ledger.rows(known, where, args.scale)
    if args.section:
        table = [row for row in table if row.id[0] == args.section]
    if args.report:
        for row in table:
            ledger.record(known[row.id], row)
        (where / "REPORT.md").write_text(ledger.report(known, where), encoding="utf-8")
    elif args.readme:
        file = Path(args.readme).expanduser()
        file.write_text(ledger.in_text(file.read_text(encoding="utf-8"), table), encoding="utf-8")
    elif args.json:
        print(json.dumps([dataclasses.asdict(row) for row in table], indent=1, ensure_ascii=False))
    elif args.markdown:
        print(ledger.markdown(table))
    else:
        show(table)
    return 0


def show(table) -> None:
    """The ledger for people."""
    from rich.table import Table
    from rich.text import Text

    from sparse_pretrain.claims import ledger
    from sparse_pretrain.training import progress

    colours = {"PASS": "green", "FAIL": "red", "REPORTED": "cyan", "NOT RUN": "yellow"}
    console = progress.console()
    found = Table(box=None, pad_edge=False, header_style="bold", show_lines=False)
    for name in ("", "claim", "published", "measured", "criterion"):
        found.add_column(name, overflow="fold", no_wrap=name == "")
    for name in ("verdict", "commit"):
        found.add_column(name, no_wrap=True)
    for row in table:
        cells = (row.id, row.claim, row.published, row.measured, row.criterion)
        verdict = Text(row.verdict, style=colours.get(row.verdict, "red"))
        found.add_row(*map(Text, cells), verdict, row.commit)
    console.print(found)
    console.print(ledger.counts(table), highlight=False)
    for device in sorted({row.device for row in table if row.device}):
        console.print(f"measured on {device}", highlight=False, soft_wrap=True)
