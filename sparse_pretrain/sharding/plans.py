"""Named plans: which mesh axes the logical dims of arrays are dealt over, one row each.

A plan is a product of parts, `fsdp_ep_pp`: first how parameters are held (ddp, zero1, fsdp), then
what else is cut (tp, ep, cp, pp). A part is a row of PARTS; the named plans are rows of PLANS.

From a plan to a compiled step, on any devices, those of a topology that is not here too:

    plan = plans.find("fsdp_ep_pp")
    laid = mesh.make(plan, "pipe=16,expert=64", devices)      # the first axis left out is the rest
    placed = apply.Placed(plan, laid, microbatches=accumulate)
    placed.check(definition, rows=batch, length=seq)          # ValueError: what would fit
    like = state.abstract(definition, tx, ema=False, placed=placed)    # shapes with NamedShardings
    step = make_train_step(definition, config, tx, schedule=schedule, accumulate=accumulate,
                           placed=placed)
    step.lower(like, placed.like_batch(shapes.Batch)).compile()

`like_batch` takes rows of any arrays or ShapeDtypeStructs. `placed` is None on one device.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

# Axes from the slowest links to the fastest: neighbours along the last lie closest together.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Axes by what they are for.

    `batch` axes are dealt the rows of a batch; `dims` says which axes cut a logical dim, in
    parameters and activations alike; `stored` axes cut each parameter between its uses, on its
    width where it has one; `optimizer` axes cut the optimizer's state so, where parameters are not.
    """

    name: str
    batch: tuple[str, ...] = ()
    dims: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    stored: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes a mesh for this plan may have."""
        known = {*self.batch, *itertools.chain(*self.dims.values())}
        return tuple(a for a in AXES if a in known)

    @property
    def rest(self) -> str:
        """The axis that takes the devices no other axis names: the last that only deals rows."""
        cut = set(itertools.chain(*self.dims.values()))
        return [a for a in self.batch if a not in cut][-1] if self.batch else ""


_CUT = ("fsdp", "expert", "context")  # tokens differ along these, so a parameter may be cut there
PARTS = {
    "single": Plan("single"),
    "ddp": Plan("ddp", batch=("data",)),
    "zero1": Plan("zero1", batch=("data",), optimizer=("data", "expert", "context")),
    "fsdp": Plan("fsdp", batch=("data", "fsdp"), stored=_CUT, optimizer=_CUT),
    "tp": Plan("tp", dims=dict.fromkeys(("H", "K", "F", "V"), ("tensor",))),
    # a memory's rows lie as experts do: whoever has a token asks whoever has the row
    "ep": Plan("ep", batch=("expert",), dims=dict.fromkeys(("E", "Row"), ("expert",))),
    "cp": Plan("cp", dims={"L": ("context",)}),
    "pp": Plan("pp", dims={"N": ("pipe",)}),
}
HOLDS, CUTS = ("ddp", "zero1", "fsdp"), ("ep", "tp", "cp", "pp")
AUTO = "auto"  # no plan: the planner's choice for the devices at hand
PLANS = (
    "single",
    "ddp",
    "zero1",
    "fsdp",
    "fsdp_tp",
    "fsdp_ep",
    "fsdp_ep_cp",
    "fsdp_ep_pp",
    "fsdp_ep_tp",
    "fsdp_ep_cp_pp",
    "zero1_ep",
    "zero1_ep_pp",  # DeepSeek-V3's own, 2412.19437 section 3.2
)


def known(name: str) -> bool:
    """Whether the name is a plan: one of the parts that hold parameters, then others in order."""
    first, *more = name.split("_")
    ordered = sorted(set(more), key=lambda p: CUTS.index(p) if p in CUTS else -1)
    return name == "single" or (first in HOLDS and more == ordered and set(more) <= set(CUTS))


def find(name: str) -> Plan:
    """The plan of this name.

    Errors: ValueError naming the plans that there are.
    """
    if not known(name):
        first, *more = name.split("_")
        ordered = "_".join([first, *sorted(more, key=lambda p: CUTS.index(p) if p in CUTS else 0)])
        close = [ordered] if known(ordered) else difflib.get_close_matches(name, PLANS, 1)
        there = (
            f"did you mean {close[0]}?"
            if close
            else f"there are {', '.join(PLANS)}, and other products of {', '.join(HOLDS)} with "
            f"{', '.join(CUTS)}, in this order"
        )
        raise ValueError(f"plan: unknown plan {name!r}; {there}")
    parts = [PARTS[part] for part in name.split("_")]
    return Plan(
        name,
        batch=tuple(a for p in parts for a in p.batch),
        dims={d: axes for p in parts for d, axes in p.dims.items()},
        stored=tuple(a for p in parts for a in p.stored),
        optimizer=tuple(a for p in parts for a in p.optimizer),
    )


def parameter(
    plan: Plan,
    sizes: Mapping[str, int],
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    *,
    use: str = "stored",
) -> PartitionSpec:
    """Where a parameter of these dims lies: as `stored`, in the `optimizer`, or as `used`.

    What `stored` and `optimizer` axes add is put on the width D, else on the longest dim they
    divide, and nowhere on a vector: cutting it would cost more messages than it saves memory.
    """
    cut = [_divided(plan.dims.get(d, ()), sizes, n) for d, n in zip(dims, shape, strict=True)]
    extra = {"used": (), "stored": plan.stored, "optimizer": plan.optimizer}[use]
    inner = [i for i, d in enumerate(dims) if d != "N"]
    if len(inner) > 1:
        taken = set(itertools.chain(*cut))
        left = tuple(a for a in extra if a not in taken and sizes.get(a, 1) > 1)
        order = sorted(inner, key=lambda i: (dims[i] != "D", -shape[i]))
        order = [dims.index("Row")] if "Row" in dims else order  # rows are looked up whole
        for count in range(len(left), 0, -1):
            at = [i for i in order if _divides((*cut[i], *left[:count]), sizes, shape[i])]
            if at:
                cut[at[0]] = (*cut[at[0]], *left[:count])
                break
    return PartitionSpec(*(_entry(axes) for axes in cut))


def _divided(axes: tuple[str, ...], sizes: Mapping[str, int], size: int) -> tuple[str, ...]:
    """The axes of the mesh that cut a dim of this size: all, or none where they do not divide."""
    axes = tuple(a for a in axes if sizes.get(a, 1) > 1)
    return axes if _divides(axes, sizes, size) else ()


def _divides(axes: tuple[str, ...], sizes: Mapping[str, int], size: int) -> bool:
    return size % math.prod(sizes.get(a, 1) for a in axes) == 0


def _entry(axes: tuple[str, ...]) -> Any:
    return axes if len(axes) > 1 else (axes[0] if axes else None)
