"""Every plan and mesh that fits a model on some chips, with its memory and time, the best first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_pretrain import config as configs
from sparse_pretrain import nn, spec
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, cost, layout, network, work
from sparse_pretrain.sharding import plans, ticks

REMAT = ("none", "dots", "full")
OFFLOAD = "offload"  # what dots keeps, on the host: only where a configuration says so
USABLE = 0.92  # of a chip's memory: the rest is the runtime's, its links' buffers and fragments
TRIED = 6  # numbers of chips that are looked at for what would fit
LARGEST = {"tensor": 8, "context": 8, "pipe": 32}  # past these an axis costs more than it saves


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan on a mesh, its micro-batches and remat policy: what it holds, how long it takes.

    Units: bytes on the fullest chip by kind; `rows` of a micro-batch on one chip group; seconds.
    """

    plan: str
    sizes: dict[str, int]
    micro: int
    remat: str
    rows: float
    memory: dict[str, float]
    step: cost.Step
    messages: list[network.Message]
    host: float = 0.0  # bytes in the memory of a chip's host

    @property
    def memory_per_chip(self) -> float:
        """Bytes, all kinds."""
        return sum(self.memory.values())

    @property
    def mesh(self) -> str:
        """As `train --mesh` takes it; axes of size 1 left out."""
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be trained on what. `experiment` has its vocabulary filled in."""

    experiment: configs.Experiment
    fleet: chips.Fleet
    precision: str = "bf16"
    constants: cost.Constants = cost.ACCELERATOR

    def pipeline(self, sizes: dict[str, int]) -> str:
        """The schedule of a plan with stages on this mesh, gpipe where it cannot run another."""
        context = sizes.get("context", 1)
        return ticks.chosen("auto" if context > 1 else self.experiment.pipeline, context)


class Planner:
    """Evaluates plans of one problem; the model's shapes are read once, or from its definition."""

    def __init__(self, problem: Problem, definition: nn.Definition | None = None):
        self.problem = problem
        e = problem.experiment
        self.model, self.rows, self.length = e.model, e.data.batch, e.data.seq
        self.definition: nn.Definition = definition or lm.define(self.model)
        self.state = layout.state(self.definition, e.optim, ema=e.ema > 0)
        self.shapes = layout.shapes(self.model, self.definition)
        self.work = work.of(self.model, self.definition, self.length)
        again = {r: work.again(self.model, self.length, r) for r in (*REMAT, OFFLOAD)}
        self.works = {r: self.work.plus(more) for r, more in again.items()}
        self.again = again["full"]
        self._known: dict[Any, Any] = {}

    def candidates(self, names: Sequence[str] = plans.PLANS) -> list[Candidate]:
        """All that divide, the fastest that fit first, then the smallest that do not.

        Of equally fast ones the one with fewest micro-batches: larger products run better.
        """
        found = [c for name in names for c in self._of_plan(plans.find(name))]
        limit = USABLE * self.problem.fleet.chip.memory

        def order(c: Candidate):
            fits = c.memory_per_chip <= limit
            first = float(f"{c.step.total:.4g}") if fits else c.memory_per_chip
            return (not fits, first, c.micro, c.memory_per_chip)

        return sorted(found, key=order)

    def fits(self, candidate: Candidate) -> bool:
        """Whether it leaves the runtime its share of a chip's memory."""
        return candidate.memory_per_chip <= USABLE * self.problem.fleet.chip.memory

    def _of_plan(self, plan: plans.Plan) -> Iterator[Candidate]:
        for sizes in self._meshes(plan):
            for micro in self._micro(plan, sizes):
                for remat in self._policies():
                    yield self.evaluate(plan, sizes, micro, remat)

    def _policies(self) -> tuple[str, ...]:
        """Those to choose from: all, but where the configuration keeps activations on the host."""
        if self.model.remat == OFFLOAD:
            return (OFFLOAD,)
        return REMAT if self.model.repeats else ("none",)

    def _meshes(self, plan: plans.Plan) -> Iterator[dict[str, int]]:
        """Every mesh of this plan over all chips whose axes divide what they cut."""
        count = self.problem.fleet.count
        if plan.name == "single":
            if count == 1:
                yield {}
            return
        rest = plan.rest
        free = [a for a in plan.axes if a != rest and not (a == "data" and "fsdp" in plan.axes)]
        options = [self._sizes(axis) for axis in free]
        for combo in itertools.product(*options):
            named = math.prod(combo)
            if count % named:
                continue
            sizes = dict.fromkeys(plan.axes, 1) | dict(zip(free, combo, strict=True))
            sizes[rest] = count // named
            # an axis a plan is named for is used; else the shorter name says the same
            if all(sizes[a] > 1 for a in free) and self._stored_divides(plan, sizes):
                yield sizes

    def _sizes(self, axis: str) -> list[int]:
        """Sizes of an axis that divide what it cuts."""
        count = self.problem.fleet.count
        sections = self.model.layer_list
        if axis == "expert":
            whole = math.gcd(*(s.ffn.experts for s in sections if s.ffn.KIND == "moe"), 0)
        elif axis == "pipe":
            whole = 1 if self.model.memory.layers else self.model.repeats
        elif axis == "context":
            whole = self.length
        else:
            whole = math.gcd(
                *(n for d, s in self.state.leaves for k, n in zip(d, s, strict=True)
                  if k in ("H", "K")), 0
            )  # fmt: skip
        most = min(LARGEST.get(axis, whole), count, whole)
        return [n for n in range(2, most + 1) if whole % n == 0 and count % n == 0]

    def _stored_divides(self, plan: plans.Plan, sizes: dict[str, int]) -> bool:
        """As sharding.apply.Placed.check: each stored axis divides the width."""
        return all(self.model.width % sizes.get(a, 1) == 0 for a in plan.stored)

    def _micro(self, plan: plans.Plan, sizes: dict[str, int]) -> list[int]:
        """Numbers of micro-batches that leave each group of chips whole rows, a few of them."""
        groups = math.prod(sizes.get(a, 1) for a in plan.batch)
        if self.rows % groups:
            return []
        share = self.rows // groups
        counts = [m for m in range(1, min(share, 4096) + 1) if share % m == 0]
        stages = sizes.get("pipe", 1)
        useful = [m for m in counts if m >= stages] or counts[-1:]
        return useful if len(useful) <= 5 else [useful[0], *useful[-4:]]

    def _fixed(self, what: str, plan: plans.Plan, sizes: dict[str, int], many: bool = False):
        """What depends on a mesh alone, worked out once."""
        key = (what, plan.name, tuple(sizes.items()), many)
        if key not in self._known:
            if what == "held":
                found: Any = layout.held_bytes(self.state, plan, sizes, 2 if many else 1)
            elif what == "weights":
                found = layout.weight_bytes(self.definition, self.model, plan, sizes)
            else:
                found = network.parameters(self.model, self.definition, plan, sizes)
            self._known[key] = found
        return self._known[key]

    def evaluate(
        self, plan: plans.Plan, sizes: dict[str, int], micro: int, remat: str
    ) -> Candidate:
        """Memory and time of one choice."""
        groups = math.prod(sizes.get(a, 1) for a in plan.batch)
        rows = self.rows / groups / micro
        tokens = rows * self.length / sizes.get("context", 1)
        memory = dict(self._fixed("held", plan, sizes, micro > 1))
        memory["activations"] = layout.activation_bytes(
            self.shapes, self.model, tokens=tokens, remat=remat, sizes=sizes, micro=micro,
            pipeline=self.problem.pipeline(sizes),
        )  # fmt: skip
        sent = 1 if self.problem.precision == "fp8" else network.BFLOAT16
        how = self.problem.experiment.context
        # a stage keeps its inputs alone and does its forward pass again, whatever its layers do
        piped = sizes.get("pipe", 1) > 1
        done = self.works[remat].plus(self.again) if piped else self.works[remat]
        passes = 2 + (remat != "none") + piped
        load = network.Load(tokens, micro, passes, sent, self.length, how)
        memory["buffers"] = self._fixed("weights", plan, sizes) + layout.working_bytes(
            self.shapes, self.model, load=load, sizes=sizes
        )
        messages = [
            *(m._replace(size=m.size * (micro if m.what == "parameters" else 1))
              for m in self._fixed("sent", plan, sizes)),
            *network.activations(self.model, sizes, load),
        ]  # fmt: skip
        problem = self.problem
        held = sum(memory[k] for k in ("parameters", "gradients", "optimizer"))
        host = memory["optimizer"] if problem.experiment.offload == "optimizer" else 0.0
        if host:  # comes to the chip to be updated, where activations and buffers were
            memory["optimizer"] = max(host - memory["activations"] - memory["buffers"], 0.0)
        if remat == OFFLOAD:
            dots = layout.activation_bytes(
                self.shapes, self.model, tokens=tokens, remat="dots", sizes=sizes, micro=micro,
                pipeline=self.problem.pipeline(sizes),
            )  # fmt: skip
            host += dots - memory["activations"]
        step = cost.step(
            done,
            problem.fleet.chip,
            tokens=self.rows * self.length / problem.fleet.count,
            micro=micro,
            messages=messages,
            sizes=sizes,
            state_bytes=held,
            host_bytes=host,
            precision=problem.precision,
            constants=problem.constants,
            pipeline=problem.pipeline(sizes),
            # a weight's gradient is one product, as its forward pass is
            delayed=self.again.linear + self.again.experts * (sizes.get("expert", 1) == 1),
        )
        return Candidate(plan.name, sizes, micro, remat, rows, memory, step, messages, host)


def chosen(planner: Planner, names: Sequence[str] = plans.PLANS) -> list[Candidate]:
    """The candidates, where the first fits.

    Errors: ValueError of one line that says what would fit.
    """
    found = planner.candidates(names)
    fleet, rows = planner.problem.fleet, planner.rows
    what = f"{fleet.count} x {fleet.chip.name}"
    if tuple(names) == ("single",) and fleet.count > 1:
        raise ValueError(
            f"--plan: single is for one chip, and there are {what}; plans for several are "
            f"{', '.join(plans.PLANS[1:])}"
        )
    if planner.model.memory.layers and all("pipe" in plans.find(name).axes for name in names):
        raise ValueError(
            f"--plan: {', '.join(names)}: a pipeline carries no rows of model.memory; take a plan "
            "without stages"
        )
    if not found:
        raise ValueError(
            f"--chips: no plan deals {rows} rows of {planner.length} tokens over {what}; "
            + _divides(planner, names)
        )
    if not planner.fits(found[0]):
        least = found[0]
        limit = USABLE * fleet.chip.memory
        plan = f"{least.plan} {least.mesh}".strip()
        raise ValueError(
            f"--chips: the smallest plan, {plan}, holds {_gigabytes(least.memory_per_chip)} on "
            f"each of {what} and there are {_gigabytes(limit)}; " + _chips_that_fit(planner, names)
        )
    return found


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


def _found(planner: Planner, names: Sequence[str], **changes: Any) -> Candidate | None:
    """The best plan of the problem with these changes, if one fits."""
    other = Planner(dataclasses.replace(planner.problem, **changes))
    found = other.candidates(names)
    return found[0] if found and other.fits(found[0]) else None


def _divides(planner: Planner, names: Sequence[str]) -> str:
    """The nearest batch, or the most chips below these, with which some plan fits: tried."""
    problem, rows = planner.problem, planner.rows
    fleet, data = problem.fleet, problem.experiment.data
    near = max(round(rows / fleet.count), 1) * fleet.count
    experiment = dataclasses.replace(
        problem.experiment, data=dataclasses.replace(data, batch=near)
    )
    told = []
    if _found(planner, names, experiment=experiment):
        told.append(f"--config.data.batch={near}")
    # axes divide what a model has in powers of two, but for a small factor
    counts = [n for n in range(fleet.count - 1, 0, -1) if rows % n == 0 and n // (n & -n) < 16]
    for count in counts[:TRIED]:
        if _found(planner, names, fleet=chips.Fleet(fleet.chip, count)):
            told.append(f"{count} chips")
            break
    return f"{' or '.join(told)} would fit" if told else "another batch or number of chips may"


def _chips_that_fit(planner: Planner, names: Sequence[str]) -> str:
    """The fewest more of these chips, by a power of two, on which some plan fits."""
    fleet = planner.problem.fleet
    if fleet.chip.name == chips.HERE:
        return "a smaller model, or chips"
    names = plans.PLANS if "single" in names else names
    parameters = sum(math.prod(shape) for _, shape in planner.state.leaves)
    state = parameters * (8 + 4 * planner.state.optimizer)
    # no fewer hold the parameters, their gradients and the optimizer's state
    least = state / (USABLE * fleet.chip.memory) / fleet.count
    first = 2 ** max(math.ceil(math.log2(least)), 1)
    for factor in (first * 2**i for i in range(TRIED)):
        if fleet.count * factor > chips.MOST:
            break
        best = _found(planner, names, fleet=chips.Fleet(fleet.chip, fleet.count * factor))
        if best:
            return f"{fleet.count * factor} x {fleet.chip.name} would fit, by {best.plan}"
    return f"its state alone is {_gigabytes(state)}"


def check_precision(precision: str, chip: chips.Chip) -> None:
    """Errors: ValueError when the chip has no such products."""
    spec.require(
        precision in cost.PRECISIONS,
        f"--precision: {precision!r} is not one of {', '.join(cost.PRECISIONS)}",
    )
    spec.require(
        precision == "bf16" or chip.fp8 > 0, f"--precision: {chip.name} has no fp8 products"
    )
