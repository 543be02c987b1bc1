"""`placement`: what placing a run's experts on devices would have done for its balance."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_pretrain.commands import errors, status

EXAMPLES = """examples:
  sparse-pretrain placement --trace=runs/quickstart
  sparse-pretrain placement --trace=runs/quickstart --devices=4 --policy=eplb,eplb+lp --window=10
  sparse-pretrain placement --trace=runs/quickstart --redundant=0.25 --out=placement.html --json

It replays the expert loads that the run recorded: experts are placed by one window of steps and
scored on the next. Nothing is trained and no device is used; step times are simulated.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--trace", metavar="RUN", required=True, help="the run's workdir")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--policy", metavar="NAME[,NAME]", help="default: all, beside `none`, the baseline"
    )
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="nodes that the devices share; a router's groups stay on one where they divide",
    )
    parser.add_argument(
        "--redundant",
        type=float,
        default=0.125,
        metavar="SHARE",
        help="copies as a share of the experts, rounded up to divide by devices (default: 0.125)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=20,
        metavar="STEPS",
        help="recorded steps between re-placements (default: 20)",
    )
    parser.add_argument(
        "--expert-share",
        type=float,
        metavar="SHARE",
        help="of a balanced step's time (default: the routed experts' share of the run's FLOPs)",
    )
    parser.add_argument("--json", action="store_true", help="for programs, no page")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/placement.html)")


def run(args: argparse.Namespace) -> int:
    """Replay the policies, print the table and write the page."""
    path = _trace(args.trace)
    if args.expert_share is not None and not 0 <= args.expert_share <= 1:
        raise errors.Usage(f"--expert-share: must lie between 0 and 1, got {args.expert_share}")
    from sparse_pretrain.report import placement, workdir
    from sparse_pretrain.sharding import policies, traces

    names = list(policies.TABLE) if args.policy is None else args.policy.split(",")
    for name in names:
        if name not in policies.TABLE:
            hint = errors.nearest(name, policies.TABLE)
            raise errors.Usage(f"--policy: unknown policy {name!r}; {hint}")
    found = workdir.read(path)
    if not any(row.get("load") for row in found.moe):
        raise errors.Usage(f"--trace: {str(path)!r} recorded no loads: the run has no experts")
    load = traces.from_rows(found.moe)
    steps, layers, experts = load.shape
    try:
        setting = policies.Setting(
            experts=experts,
            devices=args.devices,
            slots=policies.slots_for(experts, args.devices, args.redundant),
            nodes=args.nodes,
            groups=placement.groups(found),
        )
        policies.split(steps, args.window)
    except ValueError as e:  # its fields are this command's options
        raise errors.Usage(f"--{e}") from None
    costs = placement.costs(found)
    share, share_is = args.expert_share, "as given"
    if share is None:
        share, share_is = costs.share, "from the run's FLOPs"
    if share is None:
        share, share_is = placement.ASSUMED_SHARE, "assumed"
    names = list(dict.fromkeys([placement.BASELINE, *names]))
    with status(f"replaying {len(names)} policies over {steps} steps"):
        replays = policies.replays(load, names, setting, args.window)
    record: dict[str, Any] = {
        "trace": str(path),
        "name": found.name,
        "steps": steps,
        "layers": layers,
        "experts": experts,
        "devices": args.devices,
        "nodes": args.nodes,
        "groups": setting.groups,
        "slots": setting.slots,
        "window": args.window,
        "expert_share": share,
        "share_is": share_is,
        "weight_bytes": costs.weight_bytes,
        "state_bytes": costs.state_bytes,
        "policies": placement.summary(
            replays,
            setting,
            share=share,
            weight_bytes=costs.weight_bytes,
            state_bytes=costs.state_bytes,
        ),
    }
    out = Path(args.out).expanduser() if args.out else path / "placement.html"
    if args.out or not args.json:
        placement.write(out, placement.page(record, replays, load))
    if args.json:
        print(json.dumps({**record, "page": args.out and str(out)}, indent=1))
    else:
        _show(record, out)
    return 0


def _trace(name: str) -> Path:
    path = Path(name).expanduser()
    if (path / "run.json").is_file():
        return path
    runs = sorted(str(f.parent) for f in Path("runs").glob("*/run.json"))
    hint = f"; there are {', '.join(runs[:8])}" if runs else "; `sparse-pretrain train` makes one"
    raise errors.Usage(f"--trace: {str(path)!r} holds no run{hint}")


def _show(record: Mapping[str, Any], out: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from sparse_pretrain.report import placement
    from sparse_pretrain.training import progress

    console = progress.console()
    head = (
        f"{record['name']}: {record['experts']} experts in {record['slots']} slots on "
        f"{record['devices']} devices"
    )
    console.print(Text(head, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(placement.HEADER):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in placement.cells(record["policies"]):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    share = f"experts are {100 * record['expert_share']:.0f} % of a step, {record['share_is']}"
    if record["nodes"] > 1 and record["groups"] % record["nodes"]:
        count = record["groups"]
        share += f"; {count} group{'s' * (count > 1)} of experts: placed as if on one node"
    console.print(Text(f"steps/s is simulated: {share}"), style="dim", soft_wrap=True)
    console.print(Text(f"page: {out}"), soft_wrap=True)
