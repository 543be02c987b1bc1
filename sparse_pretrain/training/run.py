"""A run before its first step: data, model, optimizer, and the numbers that follow from them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from kernels_pallas import device
from sparse_pretrain import checkpoint, data, nn, optim, phases, spec
from sparse_pretrain import config as configs
from sparse_pretrain.model import engram, lm
from sparse_pretrain.optim import groups, schedules
from sparse_pretrain.planning import flops, memory
from sparse_pretrain.sharding import apply, offload, placement
from sparse_pretrain.training import processes, progress

TOKENIZER = "tokenizer.json"  # in the workdir


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a step function and an evaluation are made from."""

    experiment: configs.Experiment
    dataset: Any
    definition: nn.Definition
    run: configs.Run
    schedule: Any
    tx: Any
    derived: dict[str, Any]
    stages: tuple[phases.Stage, ...]
    placed: apply.Placed | None = None

    def put(self, batch: Any) -> Any:
        """This process's rows of a batch, where the plan wants them."""
        return batch if self.placed is None else self.placed.put(batch, self.experiment.data.batch)


def prepare(experiment: configs.Experiment, workdir: Path | None = None) -> Prepared:
    """Opens the data, fills in what follows from it, and builds the model without arrays.

    Errors: ValueError naming the field when data and configuration disagree, or when there is
    nothing to start from where `workdir` has no checkpoint of its own yet.
    """
    fresh = workdir is None or not checkpoint.steps(workdir)
    if experiment.init_from and fresh:
        start_from(experiment)  # looked at before the data, whose preparation can take minutes
    placed = place(experiment)
    index, count = share(placed, experiment)
    dataset = data.load(
        experiment.data, seed=experiment.seed, process_index=index, process_count=count,
        memory=experiment.model.memory,
    )  # fmt: skip
    experiment, run = configs.complete(
        experiment, vocab=dataset.vocab, train_tokens=dataset.train_tokens
    )
    definition = lm.define(experiment.model)
    stages = experiment.stages(run.steps)
    if placed is not None:
        for stage in stages:
            check_plan(placed, experiment, lm.define(stage.model), stage.seq)
    learned = phases.learning(stages) * run.tokens_per_step
    schedule = schedules.make(
        experiment.schedule,
        peak=experiment.optim.lr,
        total_tokens=learned,
        tokens_per_step=run.tokens_per_step,
    )
    schedule = phases.scaled(schedule, stages)
    # the optimizer multiplies by the schedule and each group's share of the peak
    factors = optim.factors(experiment.optim, experiment.model, definition, learned)
    build = optim.TABLE[experiment.optim.KIND].build
    tx = build(experiment.optim, definition.dims, schedule, factors)
    derived = derive(experiment, run) | {"train_tokens": dataset.train_tokens}
    return Prepared(experiment, dataset, definition, run, schedule, tx, derived, stages, placed)


def place(experiment: configs.Experiment) -> apply.Placed | None:
    """The experiment's plan on the devices of all processes; None for one device.

    Errors: ValueError as of `processes.place`, and where the host cannot keep what it is to keep.
    """
    here = jax.local_devices()[0]
    if experiment.offload != "none":
        offload.check(f"config.offload: {experiment.offload}", here)
        spec.require(
            not experiment.placement.every,
            f"config.placement.every: {experiment.placement.every} moves experts' moments on the "
            f"device, not with offload {experiment.offload}",
        )
    if experiment.model.remat == "offload":
        offload.check("config.model.remat: offload", here)
    where = experiment.plan, experiment.mesh
    asked = {field: getattr(experiment, field) for field in apply.CHOICES}
    return processes.place(*where, experiment.accumulate, **asked)


def share(placed: apply.Placed | None, experiment: configs.Experiment) -> tuple[int, int]:
    """(index, count) of this process among those that read a batch's rows.

    Errors: ValueError naming the field as of `Placed.share`.
    """
    try:
        return (0, 1) if placed is None else placed.share(experiment.data.batch)
    except ValueError as e:
        raise ValueError(f"config.{e}") from None


def check_plan(
    placed: apply.Placed, experiment: configs.Experiment, definition: nn.Definition, length: int
) -> None:
    """Errors: ValueError naming the field of what the plan cannot do with this run."""
    try:
        placed.check(definition, rows=experiment.data.batch, length=length)
    except ValueError as e:
        raise ValueError(f"config.{e}") from None
    if experiment.placement.every:
        placing(experiment, placed)


def placing(experiment: configs.Experiment, placed: apply.Placed | None) -> placement.Config:
    """Where the run's experts are placed: on the devices that its plan deals them over.

    Errors: ValueError naming the field and the numbers that do not fit.
    """
    devices, plan = (1, "single") if placed is None else (placed.dealt("E"), placed.plan.name)
    try:
        found = experiment.placement.over(devices, plan)
        for name, block in experiment.model.blocks.items():
            ffn: Any = block.ffn
            if getattr(ffn, "copies", 0):
                try:
                    found.check(ffn.experts, ffn.experts + ffn.copies)
                except ValueError as e:
                    raise ValueError(f"placement: {e} (model.blocks.{name}.ffn)") from None
    except ValueError as e:
        raise ValueError(f"config.{e}") from None
    return found


def start_from(experiment: configs.Experiment) -> tuple[Path, int]:
    """(workdir, step) of the checkpoint that `init_from` names.

    Errors: ValueError naming the field, and the steps that there are, when it is not there.
    """
    workdir, which = checkpoint.parse(experiment.init_from)
    try:
        return workdir, checkpoint.Checkpointer(workdir).find(which)
    except checkpoint.CheckpointError as e:
        raise ValueError(f"config.init_from: {e}") from None


def check_tokenizer(source: Path, manifest: dict[str, Any]) -> None:
    """Errors: ValueError when the run in `source` read text with another tokenizer than this one's.

    Its embeddings would stand for other tokens, and nothing would look wrong but the loss.
    """
    record = checkpoint.read_record(source) or {"manifest": {}}
    then, now = (m.get("tokenizer_hash") for m in (record["manifest"], manifest))
    if then != now:
        raise ValueError(
            f"config.data.tokenizer: its hash is {now}, that of {source} is {then}; give "
            f"--config.data.tokenizer=file:{source / TOKENIZER}"
        )


def derive(experiment: configs.Experiment, run: configs.Run) -> dict[str, Any]:
    """Numbers that follow from a complete configuration, computed once and printed.

    With phases, FLOPs per token are means over the run, memory is that of the largest phase, the
    cache that of the last, and `phases` has a row for each.
    """
    model = experiment.model
    counts = flops.parameters(model)
    micro = run.tokens_per_step // experiment.accumulate
    plain = phases.Stage(phases.BASE, 0, run.steps, model, experiment.data.seq, "all", 1.0)
    stages = experiment.stages(run.steps) if run.steps else (plain,)
    works = [_flops(stage, micro) for stage in stages]
    shares = [stage.steps / run.steps if run.steps else 1.0 for stage in stages]
    total, executed = (
        sum(share * work[i] for share, work in zip(shares, works, strict=True)) for i in (0, 1)
    )
    bytes_held = [
        memory.training_bytes(
            stage.model, micro, optimizer=experiment.optim, ema=experiment.ema > 0
        )
        for i, stage in enumerate(stages)
        if stage.model not in [earlier.model for earlier in stages[:i]]
    ]
    derived: dict[str, Any] = {
        "steps": run.steps,
        "tokens": run.tokens,
        "tokens_per_step": run.tokens_per_step,
        "total_params": counts.total,
        "active_params": counts.active,
        "active_params_with_embedding": counts.active_with_embedding,
        "train_flops_per_token": total,
        "executed_flops_per_token": executed,
        "flops": total * run.tokens,
        "kv_bytes_per_token": flops.kv_bytes_per_token(stages[-1].model),
        "memory_bytes": max(bytes_held, key=lambda held: held["total"]),
    }
    if experiment.phases and run.steps:
        rows = zip(stages, works, strict=True)
        derived["phases"] = [_phase_row(stage, work, run.tokens_per_step) for stage, work in rows]
    return derived


def _flops(stage: phases.Stage, micro: int) -> flops.TrainFlops:
    count = flops.train_flops_per_token if stage.train == "all" else flops.forward_flops_per_token
    return count(stage.model, stage.seq, micro)


def _phase_row(stage: phases.Stage, work: flops.TrainFlops, per_step: int) -> dict[str, Any]:
    """What run.json says of a phase: its first step, the tokens before it, and what it trains."""
    return {
        "name": stage.name,
        "first_step": stage.first + 1,
        "steps": stage.steps,
        "start_tokens": stage.first * per_step,
        "attention": sorted({layer.attention.KIND for layer in stage.model.layer_list}),
        "train": stage.train,
        "seq": stage.seq,
        "lr": stage.lr,
        "train_flops_per_token": work.model,
        "executed_flops_per_token": work.executed,
    }


def finished(experiment: configs.Experiment, workdir: Path) -> dict[str, Any] | None:
    """The summary of a workdir whose run is done; None when there is work to do.

    The data is not looked at, since it may be gone: what followed from it is in run.json.
    Errors: ValueError when the run there is another, or its record is damaged.
    """
    record = checkpoint.read_record(workdir)
    summary = checkpoint.read_json(workdir / "summary.json")
    if record is None or summary is None:
        return None
    if experiment.model.vocab == 0:
        model = dataclasses.replace(experiment.model, vocab=record["config"]["model"]["vocab"])
        experiment = dataclasses.replace(experiment, model=model)
    steps = experiment.steps_of(record["derived"].get("train_tokens", 0))
    if steps != summary.get("steps"):
        return None
    same_run(experiment, workdir)
    return summary


def same_run(experiment: configs.Experiment, workdir: Path) -> list[str]:
    """Notes on what this configuration does otherwise than the run in the workdir, if there is one.

    Errors: ValueError naming each differing key that makes it another run.
    """
    if checkpoint.steps(workdir):  # what was trained, whatever run.json says
        saved = checkpoint.Checkpointer(workdir).meta()["config"]
    else:
        saved = (checkpoint.read_record(workdir) or {}).get("config")
    if saved is None:
        return []
    # of before there were any
    saved["data"].setdefault("mixture", {"kind": "none"})
    saved["model"].setdefault("memory", engram.Config().to_dict())
    saved["optim"].setdefault("memory_lr", groups.MEMORY_LR)
    return checkpoint.check_compatible(saved, experiment.to_dict(), workdir)


def check_phases(experiment: configs.Experiment, workdir: Path, train_tokens: int) -> None:
    """Errors: ValueError when a longer run moves the start of a phase that training is past."""
    if not experiment.phases or not checkpoint.steps(workdir):
        return
    done = checkpoint.steps(workdir)[-1]
    before = configs.from_config_dict(checkpoint.Checkpointer(workdir).meta()["config"])
    then, now = (
        {stage.name: stage.first for stage in e.stages(e.steps_of(train_tokens))}
        for e in (before, experiment)
    )
    for name, first in now.items():
        spec.require(
            first == then[name] or min(first, then[name]) >= done,
            f"config.phases.{name}.start: is after step {then[name]} of the run in {workdir}, "
            f"which is at step {done}; in a run of {experiment.steps_of(train_tokens)} steps it "
            f"would be after step {first}; give its start in tokens",
        )


def headline(experiment: configs.Experiment, derived: dict[str, Any]) -> str:
    """What is about to be trained, on what, for how long: one line."""
    d, si = derived, progress.si
    return (
        f"{experiment.name}: {si(d['total_params'])} parameters, {si(d['active_params'])} active; "
        f"{d['steps']} steps of {d['tokens_per_step']} tokens of {experiment.data.source}; "
        f"{si(d['train_flops_per_token'])} FLOPs/token, {si(d['flops'])} in all; about "
        f"{si(d['memory_bytes']['total'])} bytes of memory"
    )


def prepare_process() -> None:
    """Keeps compiled programs between runs, in the user's cache, and memory between steps."""
    device.keep_memory()
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
