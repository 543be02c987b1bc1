"""`isoflop`: a grid of sizes and tokens at several budgets, run, fitted, and what to run next."""

import argparse
import json
from pathlib import Path
from typing import Any

from sparse_pretrain.commands import errors
from sparse_pretrain.commands.fit import numbers, score

OVERRIDES = True
EXAMPLES = """examples:
  sparse-pretrain isoflop --budgets=4e12,8e12,1.6e13,3e13 --plan
  sparse-pretrain isoflop --budgets=4e12,8e12,1.6e13,3e13
  sparse-pretrain isoflop --budgets=4e9,9.5e9,2.26e10,5.38e10,1.28e11 --widths=8,16,24,32,48 \\
      --config=experiments/isoflop.py:dense --config=experiments/isoflop.py:moe

Each budget is spent on several widths of the configuration, nearest to --ratio tokens per
parameter; heads and feed-forward widths follow the width, depth stays. No run sees a token twice.
--beyond=forecast then writes what runs up to four times beyond the grid will cost and reach, and
--beyond=run runs and scores them. The same command again skips what is finished, resumes what is
not, and fits what there is. With several --config the first is the baseline of the leverage.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--budgets", required=True, metavar="C,...", help="training FLOPs of each iso-FLOP curve"
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE[:ARG]",
        help="experiment file, or the name of one that ships; may be given again",
    )
    parser.add_argument("--widths", default="", metavar="D,...", help="model widths to choose from")
    parser.add_argument(
        "--sizes", type=int, default=4, metavar="N", help="widths per budget, 3 or more (4)"
    )
    parser.add_argument(
        "--ratio",
        type=float,
        default=20.0,
        metavar="R",
        help="tokens per parameter that the widths are chosen around (20)",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=400, metavar="N", help="refits for intervals (400)"
    )
    parser.add_argument(
        "--least-steps",
        type=int,
        default=0,
        metavar="N",
        help="leave runs of fewer steps out of the laws, as they have hardly begun to learn (0)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="a process for each run: seconds longer, and the memory at its peak is that run's own",
    )
    parser.add_argument(
        "--tasks",
        metavar="FILE",
        help="score every run on multiple-choice tasks, as `eval --tasks` does, and forecast "
        "accuracy beside loss",
    )
    parser.add_argument("--plan", action="store_true", help="print the grid and its cost, run none")
    parser.add_argument(
        "--fit-only", action="store_true", help="fit the runs that are finished, run none"
    )
    parser.add_argument(
        "--beyond",
        choices=("forecast", "run"),
        help="after the grid: forecast runs up to 4 times beyond it, or run and score them",
    )
    parser.add_argument(
        "--count", type=int, default=10, metavar="N", help="runs beyond the grid (10)"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="where runs and results go (default: runs/isoflop)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Plan, run, fit, write."""
    budgets = numbers(args.budgets, "--budgets")
    widths = [round(w) for w in numbers(args.widths, "--widths")]
    if args.sizes < 3:
        raise errors.Usage(f"--sizes: a budget takes 3 or more, got {args.sizes}")
    if not args.ratio > 0:
        raise errors.Usage(f"--ratio: must be positive, got {args.ratio}")
    if args.bootstrap < 40:
        raise errors.Usage(
            f"--bootstrap: an interval takes 40 refits or more, got {args.bootstrap}"
        )
    if args.workers < 1:
        raise errors.Usage(f"--workers: must be 1 or more, got {args.workers}")
    from rich.console import Console

    from sparse_pretrain.commands import status
    from sparse_pretrain.scaling import isoflop

    given = dict(text.split("=", 1) for text in args.overrides)
    console = Console(stderr=True) if args.json else Console()
    with status("planning the grid"):
        grid = isoflop.plan(
            args.config or [""],
            budgets,
            widths=widths,
            overrides=given,
            count=args.sizes,
            ratio=args.ratio,
        )
    if args.plan:
        show_plan(grid, as_json=args.json)
        return 0
    root = Path(args.workdir or "runs/isoflop").expanduser()
    if args.beyond:
        return beyond(args, grid, root, widths, given, console)
    file = isoflop.write(root, grid)
    record: dict[str, Any] = {"interrupted": False, "children": []}
    if not args.fit_only:
        record = isoflop.run(file, root, workers=args.workers, warm=not args.fresh, console=console)
    if args.tasks is not None:
        score(root, args.tasks)
    rows = isoflop.results(root)
    if rows:
        with status("fitting"):
            said = isoflop.analyse(rows, bootstrap=args.bootstrap, least_steps=args.least_steps)
        write(root, said, rows)
        show(said, root, as_json=args.json)
    if record["interrupted"]:
        raise errors.Stopped("interrupted; the same command continues", errors.INTERRUPTED)
    failed = [c["label"] for c in record["children"] if c["status"] == "failed"]
    if failed:
        raise errors.Stopped(f"{len(failed)} of {len(grid)} runs failed, the first: {failed[0]}")
    if not rows:
        raise errors.Stopped(f"{root} holds no finished run of this grid")
    return 0


def beyond(args: Any, grid: Any, root: Path, widths: Any, given: Any, console: Any) -> int:
    """Forecast runs beyond the grid, or run and score them."""
    from sparse_pretrain.scaling import calibration, isoflop
    from sparse_pretrain.scaling.fit import accuracy

    folder = root / "beyond"
    if args.beyond == "forecast":
        rows = isoflop.results(root)
        fits = (
            isoflop.analyse(rows, bootstrap=args.bootstrap, least_steps=args.least_steps)["fits"]
            if rows
            else {}
        )
        edge = max(p.budget for p in grid)
        budgets = [edge * factor for factor in calibration.FACTORS]
        more = isoflop.plan(
            args.config or [""],
            budgets,
            widths=widths,
            overrides=given,
            count=args.sizes,
            ratio=args.ratio,
        )
        made = calibration.write(
            folder, calibration.choose(grid, more, fits, args.count), fits, rows
        )
        if args.json:
            print(json.dumps(made, indent=1))
            return 0
        for row in made:
            low, high = row["interval"]
            console.print(
                f"{row['arm']} width {row['width']}, {row['tokens']:.3g} tokens: loss "
                f"{row['loss']:.4f} [{low:.4f}, {high:.4f}], {row['seconds']:.3g} s, "
                f"{row['memory']:.3g} bytes; {row['validity']}; "
                f"{'; '.join(accuracy.sentence(told) for told in row['accuracy'])}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        console.print(f"\nForecasts  {folder / calibration.FILE}", markup=False, soft_wrap=True)
        return 0
    if not (folder / calibration.FILE).is_file():
        raise errors.Usage(f"--beyond=run: {folder} holds no forecasts; --beyond=forecast first")
    isoflop.run(
        folder / isoflop.SWEEP,
        folder,
        workers=args.workers,
        warm=not args.fresh,
        console=console,
    )
    if args.tasks is not None:
        score(folder, args.tasks)
    said = calibration.score(folder)
    (folder / "score.json").write_text(json.dumps(said, indent=1) + "\n")
    if args.json:
        print(json.dumps(said, indent=1))
    else:
        for what, inside in said["inside"].items():
            line = f"{what}: {inside} of {said['of'][what]} inside their 95 % intervals"
            console.print(line, highlight=False)
    return 0


def write(root: Path, said: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """isoflop.json, isoflop.html, and a fit.json per arm, in the workdir."""
    from sparse_pretrain.report import isoflop as page
    from sparse_pretrain.training import record

    plain = {"arms": said["arms"], "leverage": said["leverage"], "rows": rows}
    record.write_json(root / "isoflop.json", plain)
    for place, fit in enumerate(said["fits"].values()):
        if fit is not None:
            folder = root / "fits" / str(place)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "fit.json").write_text(json.dumps(fit.to_json(), indent=1) + "\n")
    page.write(said, rows, root / "isoflop.html")


def show_plan(grid: Any, *, as_json: bool) -> None:
    """The grid and what it costs."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from sparse_pretrain.training.progress import si

    if as_json:
        print(json.dumps([dataclasses.asdict(p) for p in grid], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("config", overflow="fold")
    for name in ("budget", "width", "params", "tokens", "a param", "FLOPs"):
        table.add_column(name, justify="right")
    for p in grid:
        table.add_row(
            p.arm or "quickstart",
            f"{p.budget:.3g}",
            str(p.width),
            si(p.params),
            si(p.tokens),
            f"{p.tokens / p.params:.3g}",
            si(p.flops),
        )
    console = Console()
    console.print(table)
    console.print(f"{len(grid)} runs, {sum(p.flops for p in grid):.3g} FLOPs in all")


def show(said: dict[str, Any], root: Path, *, as_json: bool) -> None:
    """What the grid says."""
    from rich.console import Console

    if as_json:
        from sparse_pretrain.training import metrics

        plain = metrics.plain({"arms": said["arms"], "leverage": said["leverage"]})
        print(json.dumps(plain, indent=1, allow_nan=False))
        return
    from sparse_pretrain.scaling.fit import accuracy

    console = Console()
    lines = []
    for arm, own in said["arms"].items():
        law = own["law"]
        if law is None:
            lines.append(f"{arm or 'quickstart'}: no law: {own['why']}")
            continue
        parts = [
            f"{k} {law[k]:.4g} [{law['intervals'][k][0]:.4g}, {law['intervals'][k][1]:.4g}]"
            for k in ("E", "A", "B", "alpha", "beta")
        ]
        lines.append(
            f"{arm or 'quickstart'}: {', '.join(parts)}; dropped "
            f"{len(law['dropped'])}, too short {own['too_short']}"
        )
        best = own["next"][0]
        lines.append(
            f"  buy next: {best['params']:.3g} params on {best['tokens']:.3g} tokens: {best['why']}"
        )
        lines += [f"  {accuracy.described(curve)}" for curve in own["accuracy"]]
    for arm, found in said["leverage"].items():
        last = found[-1]
        low, high = last["interval"]
        lines.append(
            f"{arm}: leverage {last['leverage']:.3g} [{low:.3g}, {high:.3g}] at "
            f"{last['flops']:.3g} FLOPs"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nReport  {root / 'isoflop.html'}", markup=False, soft_wrap=True)
