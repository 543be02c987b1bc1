"""`plan=auto`: the planner's choice for the devices at hand, the first that `plan` ranks."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from sparse_pretrain import config as configs
from sparse_pretrain import data, spec
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, planner
from sparse_pretrain.sharding import peers, plans
from sparse_pretrain.training import processes, run

_KEY = "sparse_pretrain/plan"
FIELDS = ("plan", "mesh", "accumulate", "remat")


def planned(experiment: configs.Experiment) -> tuple[configs.Experiment, str]:
    """(the experiment with a plan, what to say of it); as it is, and nothing, if it names one.

    Plan, mesh, micro-batches and remat are the planner's. Process 0 chooses for all.
    Errors: ValueError of one line when a mesh is given too, or nothing fits, saying what would.
    """
    if experiment.plan != plans.AUTO:
        return experiment, ""
    spec.require(
        not experiment.mesh,
        f"config.mesh: {experiment.mesh!r} is given, and plan auto chooses the mesh",
    )
    if not processes.several():
        told = _chosen(experiment)
    elif processes.lead():
        told = _chosen(experiment)
        peers.store().key_value_set(_KEY, json.dumps(told))
    else:
        told = json.loads(peers.store().blocking_key_value_get(_KEY, peers.PATIENCE * 1000))
    spec.require("refused" not in told, told.get("refused", ""))
    return _with(experiment, {f: told[f] for f in FIELDS}), told["said"]


def _chosen(experiment: configs.Experiment) -> dict[str, Any]:
    """The choice as plain data, or why there is none: the other processes wait for either."""
    try:
        return next(choices(experiment, chips.at_hand()))
    except ValueError as e:
        return {"refused": str(e)}


def choices(experiment: configs.Experiment, fleet: chips.Fleet) -> Iterator[dict[str, Any]]:
    """Every choice that fits this fleet and that this run can be trained with, the best first.

    Errors: ValueError when there is none.
    """
    size = experiment.model.vocab or data.vocab(experiment.data, seed=experiment.seed)
    model = dataclasses.replace(experiment.model, vocab=size)
    asked = dataclasses.replace(experiment, plan="single", model=model)
    found = planner.Planner(planner.Problem(asked, fleet))
    refused, some = None, False
    for candidate in planner.chosen(found):
        if not found.fits(candidate):
            break
        told = {"plan": candidate.plan, "mesh": candidate.mesh, "accumulate": candidate.micro,
                "remat": candidate.remat}  # fmt: skip
        try:
            check(_with(asked, told))
        except ValueError as e:
            refused = refused or e
            continue
        some = True
        mesh = f", mesh {candidate.mesh}" if candidate.mesh else ""
        yield told | {
            "said": f"plan auto: {candidate.plan}{mesh}, accumulate {candidate.micro}, remat "
            f"{candidate.remat}; by estimate {candidate.memory_per_chip / 1e9:.3g} GB of "
            f"{fleet.chip.memory / 1e9:.3g} on each of {fleet.count} x {fleet.chip.name}"
        }
    if not some:
        raise refused or ValueError("config.plan: auto found no plan")


def check(experiment: configs.Experiment) -> None:
    """Errors: ValueError naming the field of what the plan cannot do with this run."""
    placed = run.place(experiment)
    if placed is not None:
        run.share(placed, experiment)
        for stage in experiment.stages(experiment.steps_of(0) or 1):
            run.check_plan(placed, experiment, lm.define(stage.model), stage.seq)


def _with(experiment: configs.Experiment, told: dict[str, Any]) -> configs.Experiment:
    model = dataclasses.replace(experiment.model, remat=told["remat"])
    return dataclasses.replace(
        experiment, model=model, plan=told["plan"], mesh=told["mesh"],
        accumulate=told["accumulate"],
    )  # fmt: skip
