"""`plan`: what a run costs on some chips, which plan it should use, and why."""

import argparse
import json
from typing import Any

from sparse_pretrain.commands import errors, train

OVERRIDES = True
EXAMPLES = """examples:
  sparse-pretrain plan --config=deepseek/v3 --chips=h800:2048 --tokens=14.8e12
  sparse-pretrain plan --config=olmoe_1b_7b --chips=h100:64 --price=2.2 --json
  sparse-pretrain plan --config=mixtral_8x7b --chips=v5p:4x4x8 --plan=fsdp_ep
  sparse-pretrain plan --config=deepseek/v3 --chips=h800:2048 --compile
  sparse-pretrain plan --budget=1000usd --chips=h200:1
  sparse-pretrain plan --budget=0.1h --config=experiments/isoflop.py:moe --fit=runs/isoflop/fits/1

A step's time comes from a roofline with two fitted constants: four of five published runs lie
within a factor 1.34 of it (experiments/benchmarks/published_costs.py). --compile asks the chips'
own compiler for memory and collectives of the real step: pip install 'sparse-pretrain[compile]'.

The loss is forecast by --fit: the folder or fit.json of a sweep of yours (`fit`, `isoflop`), or a
fit that ships, with the range it is known for. --budget tries the widths of --config, or a ladder
of dense Llamas; lr.json and batch.json beside the fit (`fit --law=lr`) set rate and batch.
"""
SHOWN = 5


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    train.add_config(parser)
    parser.add_argument(
        "--chips",
        metavar="CHIP:N",
        default="cpu",
        help="h100, h200, h800, a100, b200, l40s, rtx4090, v5e, v5p, v6e, tpu7x or cpu, with how "
        "many, or a TPU's grid as in v5p:8x16x16; cpu:8 as train --cpu-devices=8 (default: this "
        "machine's processor)",
    )
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="to train on (default: the configuration's)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of a chip-hour")
    parser.add_argument("--plan", metavar="NAME", help="only this plan (default: the best of all)")
    parser.add_argument(
        "--pipeline", metavar="NAME", help="how stages take turns: auto, 1f1b, zero_bubble or gpipe"
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp8"),
        help="of products (default: what the experiment's file declares, else bf16)",
    )
    parser.add_argument(
        "--budget",
        metavar="AMOUNT",
        help="1000usd, or 8h on all chips: the model, data and plan to spend it on",
    )
    parser.add_argument(
        "--fit",
        metavar="WHERE",
        help="a fit's folder or file, or the name of one that ships, to forecast the loss by "
        "(default: chinchilla)",
    )
    parser.add_argument("--compile", action="store_true", help="ask the chips' own compiler")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Plan, and print it."""
    if args.compile:  # before any device is looked for: a plugin would find none and complain
        import jax

        jax.config.update("jax_platforms", "cpu")
    from sparse_pretrain.planning import chips

    for name in ("tokens", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e18:
            raise errors.Usage(f"--{name}: must be positive, got {value:g}")
    fleet = chips.parse(args.chips)
    if args.budget is not None:
        from sparse_pretrain.planning import forecast

        fit, laws = _fits(args)
        rungs = _rungs(args) if args.config or args.overrides else None
        told = forecast.spend(args.budget, fleet, args.price, fit=fit, rungs=rungs, laws=laws)
        print(json.dumps(told, indent=1) if args.json else forecast.sentences(told))
        return 0
    found, told = _plan(args, fleet)
    if args.json:
        print(json.dumps(told, indent=1))
        return 0
    _show(found, told)
    return 0


def _fits(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(the law of loss, the laws of lr and batch that lie beside it)."""
    from pathlib import Path

    from sparse_pretrain.planning import forecast as budgets
    from sparse_pretrain.scaling import forecast
    from sparse_pretrain.scaling.fit import settings

    try:
        fit = forecast.read(args.fit or budgets.DEFAULT)
    except ValueError as e:
        raise errors.Usage(f"--fit: {str(e).removeprefix('fit: ')}") from None
    folder = Path(args.fit or "").expanduser()
    folder = folder if folder.is_dir() else folder.parent
    laws = {}
    for name in settings.SETTINGS if args.fit else ():
        if (folder / f"{name}.json").is_file():
            laws[name] = settings.read(folder / f"{name}.json")
    return fit, laws


def _rungs(args: argparse.Namespace) -> Any:
    """The configuration at every width at which its heads are whole."""
    import dataclasses

    from sparse_pretrain import config
    from sparse_pretrain.planning import forecast
    from sparse_pretrain.scaling import sizes

    base = _experiment(args)
    for width in sizes.widths(base):
        own = sizes.resize(base, width)
        flags = [*args.overrides, *(f"{key}={value}" for key, value in own.items())]
        experiment = config.resolve(args.config, flags)
        model = dataclasses.replace(experiment.model, vocab=base.model.vocab)
        found = dataclasses.replace(experiment, model=model)
        given = dict(flag.split("=", 1) for flag in args.overrides)
        yield forecast.Rung(args.config or "quickstart", found, given | own, own=True)


def _plan(args: argparse.Namespace, fleet: Any) -> tuple[Any, dict[str, Any]]:
    from sparse_pretrain.planning import planner, summary
    from sparse_pretrain.sharding import plans

    experiment = _experiment(args)
    from sparse_pretrain import config

    precision = args.precision or config.declared(args.config, "PRECISION", "bf16")
    if args.precision is None and not fleet.chip.fp8:
        precision = "bf16"
    planner.check_precision(precision, fleet.chip)
    names = plans.PLANS if args.plan is None else (plans.find(args.plan).name,)
    problem = planner.Problem(experiment, fleet, precision)
    found = planner.Planner(problem)
    ranked = planner.chosen(found, names)
    told = summary.of(found, ranked, tokens=args.tokens, price=args.price, config=args.config)
    told["forecast"] = _forecast(args, experiment, told["tokens"])
    if args.compile:
        import dataclasses

        from sparse_pretrain.planning import compile as compiler

        best = ranked[0]
        made = compiler.compiled(
            experiment, fleet, plan=best.plan, sizes=best.sizes, micro=best.micro, remat=best.remat
        )
        told["compiled"] = dataclasses.asdict(made)
        told["compiled"]["fits"] = made.memory_per_chip_bytes <= fleet.chip.memory
    return ranked, told


def _forecast(args: argparse.Namespace, experiment: Any, tokens: float | None) -> Any:
    """The loss after `tokens`, by --fit; None while nothing says how many they are."""
    if not tokens:
        return None
    from sparse_pretrain.scaling import forecast

    fit, _ = _fits(args)
    said = forecast.of_config(fit, experiment, tokens)
    return said | {
        "law": fit.provenance["data"],
        "law_span": {k: list(v) for k, v in fit.span.items()},
    }


def _experiment(args: argparse.Namespace) -> Any:
    """The experiment with its vocabulary, which a tokenizer's name may have to say."""
    import dataclasses

    from sparse_pretrain.commands import config

    experiment = train.resolve(args)
    model = dataclasses.replace(experiment.model, vocab=config.vocab(experiment))
    return dataclasses.replace(experiment, model=model)


def _show(ranked: Any, told: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sparse_pretrain.planning import forecast, summary
    from sparse_pretrain.training import progress

    console = progress.console()
    console.print(summary.headline(told), soft_wrap=True, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("plan", "mesh", "remat"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for name in ("micro-batches", "GB/chip", "step, s", "chip-hours"):
        table.add_column(name, justify="right")
    for i, row in enumerate(told["ranked"]):
        style = "bold" if i == 0 else ""
        cells = (row["plan"], row["mesh"], row["remat"], row["micro_batches"])
        gigabytes, seconds = row["memory_per_chip_bytes"] / 1e9, row["step_seconds"]
        numbers = (f"{gigabytes:.1f}", f"{seconds:.3g}", summary.amount(row["chip_hours"]))
        table.add_row(*(Text(str(c)) for c in (*cells, *numbers)), style=style)
    console.print(table)
    console.print()
    lines = summary.sentences(told)
    if told["forecast"]:
        lines[-1:-1] = forecast.said(told["forecast"], told["forecast"]["law"])
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
