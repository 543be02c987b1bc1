"""`fit`: a scaling law from runs or from a CSV, with intervals and a page."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from sparse_pretrain.commands import errors

EXAMPLES = """examples:
  sparse-pretrain fit runs/isoflop
  sparse-pretrain fit --csv=losses.csv --flops=1e21,1e22 --json
  sparse-pretrain fit --csv=losses.csv --law=joint
  sparse-pretrain fit --csv=losses.csv --drop=none --workdir=runs/fits/all
  sparse-pretrain fit runs/rates --law=lr --of=params,tokens
  sparse-pretrain fit runs/isoflop --tasks=heldout:400

A CSV has the column `loss` and two of `params` (or `Model Size`, `N`), `tokens` (`D`) and `flops`
(`Training FLOP`, `C`); the third follows from C = 6 N D. The law `joint` needs `expansion` besides
(all over active parameters), `sparse_attention` needs `keys` (those a token reads). fit.json and
fit.html are written to the workdir; `plan --fit=WORKDIR` reads fit.json. Runs that were scored on
tasks (synthetic ones, or --tasks) give a curve from loss to accuracy besides.

The laws `lr` and `batch` take runs, or a CSV with that column, that tried several values at several
sizes: a parabola finds the best value of each size, and a power law goes through those. They are
written to lr.json or batch.json, which `plan --budget --fit=WORKDIR` uses too.
"""
SETTINGS = ("lr", "batch")


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="?", metavar="RUNS", help="a folder of finished runs")
    parser.add_argument("--csv", metavar="FILE", help="a table of runs instead")
    parser.add_argument(
        "--law",
        default="chinchilla",
        metavar="LAW",
        help="chinchilla (default), joint or sparse_attention; or of a setting: lr or batch",
    )
    parser.add_argument(
        "--of",
        default="flops",
        metavar="NAME,...",
        help="what a law of lr or batch is a power of: flops (default), params, tokens",
    )
    parser.add_argument(
        "--tasks",
        metavar="FILE",
        help="first score the runs on multiple-choice tasks, as `eval --tasks` does",
    )
    parser.add_argument(
        "--drop",
        default="rule",
        metavar="RULE",
        help="which runs are left out: rule (default; printed), none, or highest:K losses",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=400, metavar="N", help="refits for intervals (400)"
    )
    parser.add_argument(
        "--flops", default="", metavar="C,...", help="budgets to say the best size and tokens for"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument(
        "--workdir", metavar="DIR", help="where fit.json and fit.html go (default: runs/fits/NAME)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Fit, write, print."""
    if bool(args.runs) == bool(args.csv):
        raise errors.Usage("fit: takes a folder of runs or --csv=FILE, one of the two")
    if args.bootstrap < 40:
        raise errors.Usage(
            f"--bootstrap: an interval takes 40 refits or more, got {args.bootstrap}"
        )
    if args.tasks is not None and not args.runs:
        raise errors.Usage("--tasks: scores runs, and a CSV has none; give a folder of runs")
    budgets = numbers(args.flops, "--flops")
    if args.law in SETTINGS:
        return setting(args)
    from sparse_pretrain.commands import status
    from sparse_pretrain.scaling.fit import laws, tables

    # mistakes first: what comes after imports jax, which takes seconds
    extra = laws.find(args.law).columns[2:]
    left: list[str] = []
    if args.csv:
        where = Path(args.csv).expanduser()
        table = tables.read_csv(where, extra)
    else:
        where = folder_of(args)
        table, left = tables.from_runs(where, extra)
    from sparse_pretrain.report import fits as page
    from sparse_pretrain.scaling import forecast
    from sparse_pretrain.scaling.fit import accuracy, fitting, workdirs

    curves: list[accuracy.Curve] = []
    if args.runs:
        if args.tasks is not None:
            score(where, args.tasks)
        curves = accuracy.of_rows(workdirs.rows(where)[0], bootstrap=args.bootstrap)
    with status("fitting"):
        fit = fitting.fit(
            table,
            args.law,
            drop=args.drop,
            bootstrap=args.bootstrap,
            seed=args.seed,
            provenance={"command": " ".join(args.argv)},
        )
        fit = dataclasses.replace(fit, accuracy=tuple(curve.to_json() for curve in curves))
        optimal = forecast.optimal(fit, budgets)
    folder = Path(args.workdir or f"runs/fits/{where.stem}").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fit.json").write_text(json.dumps(fit.to_json(), indent=1) + "\n")
    page.write(fit, table, folder / "fit.html", title=f"Law of {where.stem}", optimal=optimal)
    if args.json:
        out = fit.to_json(samples=False) | {"optimal": optimal, "left_out": left}
        print(json.dumps(out, indent=1))
    else:
        show(fit, optimal, left)
        print(f"\nReport  {folder / 'fit.html'}")
    return 0


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of runs. Errors: Usage when it is none."""
    where = Path(args.runs).expanduser()
    if not where.is_dir():
        raise errors.Usage(f"fit: {where} is not a folder")
    return where


def score(root: Path, tasks: str) -> None:
    """Score every finished run at or below a folder on tasks."""
    from sparse_pretrain.commands import status
    from sparse_pretrain.scaling.fit import workdirs
    from sparse_pretrain.training import loop, trained

    loop.run.prepare_process()
    with status("scoring the tasks"):
        for path in workdirs.finished(root):
            trained.keep_choices(path, tasks)


def setting(args: argparse.Namespace) -> int:
    """Fit, write and print a law of learning rate or batch.

    Errors: Stopped when too few sizes have an optimum; what was found is written all the same.
    """
    from sparse_pretrain.scaling.fit import settings, workdirs

    of = [name.strip() for name in args.of.split(",") if name.strip()]
    if args.csv:
        where = Path(args.csv).expanduser()
        rows: list[dict[str, Any]] = list(settings.read_csv(where))
    else:
        where = folder_of(args)
        rows = workdirs.rows(where)[0]
        if not rows:
            raise errors.Usage(f"fit: {where} holds no finished run")
    law = settings.fit(
        rows, args.law, of, source=where.name, provenance={"command": " ".join(args.argv)}
    )
    folder = Path(args.workdir or f"runs/fits/{where.stem}").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.law}.json").write_text(json.dumps(law, indent=1) + "\n")
    if args.json:
        print(json.dumps(law, indent=1))
    else:
        print("\n".join([*settings.lines(law), f"\nLaw  {folder / f'{args.law}.json'}"]))
    if law["constants"] is None:
        raise errors.Stopped(f"--law={args.law}: no law: {law['why']}")
    return 0


def numbers(text: str, name: str) -> list[float]:
    """The positive numbers of `a,b,...`. Errors: Usage naming the option and the part."""
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            found.append(float(part))
        except ValueError:
            raise errors.Usage(f"{name}: {part!r} is not a number") from None
        if not 0 < found[-1] < float("inf"):
            raise errors.Usage(f"{name}: must be positive, got {part}")
    return found


def show(fit: Any, optimal: list[dict[str, Any]], left: list[str]) -> None:
    """The fit for people."""
    from rich.console import Console
    from rich.table import Table

    from sparse_pretrain.scaling.fit import accuracy
    from sparse_pretrain.training.progress import si

    console = Console()
    console.print(fit.provenance["formula"], highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("constant")
    for name in ("value", "95 % interval"):
        table.add_column(name, justify="right")
    for name, value in fit.constants.items():
        low, high = fit.intervals[name]
        table.add_row(name, f"{value:.6g}", f"{low:.4g} to {high:.4g}")
    console.print(table)
    held = fit.held_out
    said = f"{100 * held['mean_abs_error']:.2f} % of the loss" if held else "too few runs"
    lines = [
        f"{fit.runs} runs; scatter about the law {100 * fit.noise:.2f} %; held-out forecast "
        f"error: {said}",
        f"dropped {len(fit.dropped)}: {fit.rule}",
        *(f"  {r['run']}: loss {r['loss']:.4g}, {r['reason']}" for r in fit.dropped),
        *(f"left out: {line}" for line in left),
    ]
    for row in optimal:
        low, high = row["loss_interval"]
        lines.append(
            f"best at {row['flops']:.3g} FLOPs: {si(row['params'])} params, {si(row['tokens'])} "
            f"tokens ({row['tokens_per_param']:.1f} a param), loss {row['loss']:.4f} "
            f"[{low:.4f}, {high:.4f}], {row['validity']}; "
            f"{'; '.join(accuracy.sentence(told) for told in row['accuracy'])}"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
