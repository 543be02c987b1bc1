"""The real training step, compiled ahead of time for chips that are not here.

Differs from the rest of planning: it stands on floor 6, for it builds the step of training.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import chips as targets
from kernels_pallas import device
from sparse_pretrain import config as configs
from sparse_pretrain import optim, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, hlo
from sparse_pretrain.sharding import apply, mesh, offload, plans
from sparse_pretrain.training import state, step

EXTRA = targets.EXTRA


def _gpu(name: str, kind: str, capability: tuple[int, int], cores: int, l2: int, clock: float):
    chip = chips.CHIPS[name]
    target = device.Target("gpu", kind, capability, cores)
    return targets.Chip(
        name, target, chip.bf16, chip.bandwidth, chip.memory, "1x1x1", l2 << 20, clock
    )


# Chips that no kernel is written for and a step is compiled for; NVIDIA's data sheets.
_MORE = {
    "h800": ("NVIDIA H800", (9, 0), 132, 50, 1.98),
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40, 1.41),
    "l40s": ("NVIDIA L40S", (8, 9), 142, 96, 2.52),
    "rtx4090": ("NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 2.52),
}
_GRIDS = {"v5e": (16, 16), "v5p": (4, 4, 4), "v6e": (16, 16), "tpu7x": (4, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one chip's program, a step of it.

    Units: bytes, `host_bytes` those in the host's memory; `flops`, `collectives`, `open_loops` and
    `kernels` as in `hlo.Counted`; seconds to lower and compile.
    """

    memory_per_chip_bytes: int
    arguments_bytes: int
    temporary_bytes: int
    host_bytes: int
    flops: float
    collectives: dict[str, dict[str, int]]
    open_loops: int
    kernels: int
    seconds: float


def target(fleet: chips.Fleet) -> targets.Chip:
    """What the vendor's compiler is told of this chip.

    Errors: ValueError when there is none, or a package of it is missing, naming the extra.
    """
    name = fleet.chip.name
    if name in _MORE:
        found = _gpu(name, *_MORE[name])
    elif name in targets.CHIPS:
        found = targets.CHIPS[name]
    elif name == "v5e":
        found = targets.Chip(
            name, device.Target("tpu", "TPU v5 lite"), 197e12, 819e9, 16e9, "v5e:2x2"
        )
    else:
        raise ValueError(f"--compile: there is no compiler of {name} to ask; leave --compile out")
    missing = found.missing()
    if missing:
        raise ValueError(
            f"--compile: {missing} not installed; pip install 'sparse-pretrain[{EXTRA}]'"
        )
    return found


def devices(fleet: chips.Fleet) -> list[Any]:
    """As many devices of this chip as the fleet has, which programs are compiled for."""
    found = target(fleet)
    # no chip is opened, so another program may have libtpu's lock
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if found.target.platform == "gpu":
        nodes, rest = divmod(fleet.count, fleet.chip.node)
        grid = f"1x{nodes}x{fleet.chip.node}" if nodes and not rest else f"1x1x{fleet.count}"
        return found.devices(grid)
    if fleet.topology:
        return found.devices(fleet.topology)
    grids = list(_grids(fleet.count, len(_GRIDS[fleet.chip.name])))
    if not grids:
        raise ValueError(
            f"--compile: {fleet.count} chips are no grid of {fleet.chip.name}; give one, as in "
            f"--chips={fleet.chip.name}:{'x'.join(map(str, _GRIDS[fleet.chip.name]))}"
        )
    return found.devices(f"{fleet.chip.name}:{grids[0]}")


def _grids(count: int, dims: int) -> Iterator[str]:
    """The most even grid of powers of two."""
    if count & (count - 1) or count < 4:
        return
    power = count.bit_length() - 1
    sides = [power // dims + (i >= dims - power % dims) for i in range(dims)]
    yield "x".join(str(2**n) for n in sides)


def compiled(
    experiment: configs.Experiment,
    fleet: chips.Fleet,
    *,
    plan: str,
    sizes: dict[str, int],
    micro: int,
    remat: str,
) -> Compiled:
    """Lowers and compiles the step of `train` under this plan. Nothing is allocated.

    `experiment` has its vocabulary filled in. NVIDIA chips that are not here have no memories to
    JAX 0.12, which forgets that an array is to lie in the host's: what `config.offload` keeps there
    counts as the chip's.
    Errors: ValueError as of the plan's own checks.
    """
    began = time.perf_counter()
    model = dataclasses.replace(experiment.model, remat=remat)
    definition = lm.define(model)
    rate = lambda count: jnp.float32(experiment.optim.lr)  # noqa: E731 (a schedule's cost is none)
    tx = optim.TABLE[experiment.optim.KIND].build(experiment.optim, definition.dims, rate)
    found, chosen, where = plans.find(plan), target(fleet), devices(fleet)
    rows, length = experiment.data.batch, experiment.data.seq
    placed = None
    if found.axes:
        text = ",".join(f"{a}={n}" for a, n in sizes.items())
        laid = mesh.make(found, text, where)
        asked = {field: getattr(experiment, field) for field in apply.CHOICES}
        placed = apply.Placed(found, laid, microbatches=micro, **asked)
        placed.check(definition, rows=rows, length=length)
    ema = experiment.ema > 0
    with device.assume(chosen.target):
        fields = dict.fromkeys(shapes.FIELDS, jnp.int32) | {"weights": jnp.float32}
        like_rows: Any = {f: jax.ShapeDtypeStruct((rows, length), d) for f, d in fields.items()}
        if model.memory.layers:
            read = (rows, length, model.memory.carried)
            like_rows["memory"] = jax.ShapeDtypeStruct(read, jnp.int32)
        batch = shapes.Batch(**like_rows)
        host = experiment.offload == "optimizer"
        like = state.abstract(definition, tx, ema=ema, placed=placed, host=host)
        if placed is None:
            like, batch = _on(where[0], (like, batch))
            if host:
                here = jax.tree.map(lambda x: x.sharding, like.opt)
                there = offload.shardings(like.opt, here)
                like = like._replace(opt=jax.tree.map(_like, like.opt, there))
        else:
            batch = placed.like_batch(batch)
        run = step.make_train_step(
            definition, model, tx, schedule=rate, accumulate=micro, ema=experiment.ema,
            placed=placed, host=host,
        )  # fmt: skip
        program = run.lower(like, batch).compile()
    memory: Any = program.memory_analysis()
    runs = hlo.count(program.as_text() or "")
    given, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    kept = _on_host(like)
    if not memory.host_argument_size_in_bytes:  # NVIDIA's compiler counts them with the others
        given -= kept
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        memory_per_chip_bytes=int(given + temporary + made),
        arguments_bytes=int(given),
        temporary_bytes=int(temporary),
        host_bytes=int(kept + memory.host_temp_size_in_bytes),
        **dataclasses.asdict(runs),
        seconds=time.perf_counter() - began,
    )


def _on_host(tree: Any) -> int:
    """Bytes of one chip's parts of the arrays that wait in its host's memory."""
    total = 0
    for x in jax.tree.leaves(tree):
        if getattr(x.sharding, "memory_kind", None) == offload.HOST:
            total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return total


def _on(one: Any, tree: Any) -> Any:
    """The tree's shapes on one device."""
    there = jax.sharding.SingleDeviceSharding(one)
    return jax.tree.map(lambda x: _like(x, there), tree)


def _like(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
