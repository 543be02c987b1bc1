"""Phases of a run: from a token on other attention, other rows, or only the indexers trained.

A phase states all that differs from the run's own configuration, not from the phase before it, so
that one phase alone says what is trained in it. Phases never change the parameters' names or shapes
or the order of the data, so checkpoints, optimizer and cursor know nothing of them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain import attention, nn, sections, spec
from sparse_pretrain.model import lm
from sparse_pretrain.optim import schedules

TRAINS = ("all", "indexer", "prices")
BASE = "base"  # what the steps before the first phase go by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase(spec.Config):
    """What is otherwise from `start` on, until the next phase starts.

    `attention` names blocks and gives the section that replaces theirs; keys left out are the
    replaced section's where the kinds share them. `train=indexer` moves only what the attentions
    train by losses of their own: no other parameter, moment, average or price changes.
    `train=prices` moves the experts' prices alone, by ever shorter steps: without a backward pass
    they settle on weights that stand still.
    Units: `start` tokens, or below 1 a fraction of the run; `seq` tokens per row, 0 for data.seq;
    `lr` a multiple of the schedule's rate; `mtp_weight` in place of model.mtp.weight, None for it.
    """

    start: float
    attention: Mapping[str, spec.Config] = dataclasses.field(default_factory=dict)
    train: str = "all"
    seq: int = 0
    lr: float = 1.0
    mtp_weight: float | None = None

    def __post_init__(self):
        ok = math.isfinite(self.start) and self.start >= 0
        rule = "must be tokens or a fraction of the run, 0 or more"
        spec.require(ok, f"start: {rule}, got {self.start}")
        known = sections.nearest(self.train, TRAINS)
        spec.require(self.train in TRAINS, f"train: unknown value {self.train!r}; {known}")
        ok = self.seq == 0 or self.seq >= 2
        spec.require(ok, f"seq: a row holds at least 2 tokens, got {self.seq}; 0 is data.seq")
        spec.positive(self, "lr")
        ok = self.mtp_weight is None or self.mtp_weight > 0
        spec.require(ok, f"mtp_weight: must be positive or None, got {self.mtp_weight}")


class Stage(NamedTuple):
    """What a phase comes to in a run of known length.

    Units: `first` optimizer steps taken before it, of which it takes `steps`; `seq` tokens.
    """

    name: str
    first: int
    steps: int
    model: lm.Config
    seq: int
    train: str
    lr: float


# --- from the configuration ---


def inherit(schema: sections.Schema, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` with each phase's attention sections laid over those that they replace.

    A key that a phase leaves out is the replaced section's where both kinds have it: else a changed
    rope.theta or softcap would silently be the kind's default in one phase.
    Errors: ValueError for what is no mapping, naming it.
    """
    if not values.get("phases"):
        return values
    path = f"{schema.name}.phases"
    model = schema.fill({k: v for k, v in values.items() if k != "phases"}).get("model", {})
    new = {}
    for name, phase in sections.as_mapping(values["phases"], path).items():
        new[name] = phase = dict(sections.as_mapping(phase, f"{path}.{name}"))
        if "attention" not in phase:
            continue
        given = sections.as_mapping(phase["attention"], f"{path}.{name}.attention")
        phase["attention"] = {
            block: _over(model["blocks"][block]["attention"], sections.plain(section))
            if block in model.get("blocks", {})
            else section
            for block, section in given.items()
        }
    return {**values, "phases": new}


def _over(base: Mapping[str, Any], section: Any) -> Any:
    kind = section.get("kind", base["kind"]) if isinstance(section, Mapping) else None
    if not isinstance(kind, str) or kind not in attention.TABLE:
        return section  # refused where it is built
    known = {"kind", *spec.field_types(attention.TABLE[kind].Config)}
    return _merged({k: v for k, v in base.items() if k in known}, section) | {"kind": kind}


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in given.items():
        below = base.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        out[key] = value
    return out


def check(phases: Mapping[str, Phase], model: lm.Config, seq: int) -> None:
    """ValueError naming the field where a phase cannot train what the model holds."""
    for name, phase in phases.items():
        path = f"phases.{name}"
        ok = name != BASE and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) is not None
        rule = f"a phase's name is letters, digits, '_' and '-', and not {BASE!r}"
        spec.require(ok, f"phases: {rule}; got {name[:120]!r}")
        ok = seq % (phase.seq or seq) == 0
        spec.require(ok, f"{path}.seq: {phase.seq} does not divide data.seq {seq}")
        spec.require(
            not (model.memory.layers and phase.seq not in (0, seq)),
            f"{path}.seq: {phase.seq} cuts rows of {seq} whose n-grams model.memory has hashed",
        )
        for block, section in phase.attention.items():
            where = f"{path}.attention.{block}"
            near = sections.nearest(block, model.blocks)
            spec.require(block in model.blocks, f"{where}: the model has no such block; {near}")
            shown = f"{path}.seq" if phase.seq else "data.seq"
            check_attention(section, where, model.width, phase.seq or seq, shown)
            _check_same(section, model.blocks[block].attention, where, model.width)
        spec.require(
            phase.mtp_weight is None or model.mtp.depth > 0,
            f"{path}.mtp_weight: {phase.mtp_weight}, but model.mtp.depth is {model.mtp.depth}",
        )
        owned = lm.own_parameters(model_of(model, phase))
        spec.require(
            phase.train != "prices" or _has_prices(model),
            f"{path}.train: 'prices', but no router of the model has prices (routers "
            f"{', '.join(_routers(model)) or 'none'})",
        )
        spec.require(
            phase.train != "indexer" or bool(owned),
            f"{path}.train: 'indexer', but in this phase no attention trains one by a loss of its "
            f"own (kinds {', '.join(_kinds(model_of(model, phase)))})",
        )


def check_attention(section: Any, path: str, width: int, seq: int, shown: str) -> None:
    """ValueError naming `path` or `shown`, the field that `seq` is from, where they do not fit."""
    try:
        attention.TABLE[section.KIND].kv_elements(section, width)
    except ValueError as e:
        raise ValueError(f"{path}.{e}") from None
    rope = getattr(section, "rope", None)
    if rope is None or rope.factor <= 1:
        return
    reach = int(rope.original * rope.factor)
    spec.require(
        seq <= reach,
        f"{shown}: {seq} tokens are more than the {reach} that {path}.rope reaches (original "
        f"{rope.original} x factor {rope.factor:g})",
    )


def _check_same(section: spec.Config, base: spec.Config, where: str, width: int) -> None:
    """ValueError unless both sections' attentions hold the same parameters."""
    if section == base:
        return
    ours, theirs = held(section, width), held(base, width)
    different = sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
    if not different:
        return
    first = different[0]
    now, then = (", ".join(map(str, h[first])) if first in h else "none" for h in (ours, theirs))
    a, b = (sections.flat(sections.plain(s)) for s in (section, base))
    keys = [k for k in a if k in b and a[k] != b[k]]
    raise ValueError(
        f"{where}: its parameters must be the model's, and {first} is [{now}] here and [{then}] "
        f"there (settings of both that differ: {', '.join(keys)})"
    )


def held(section: spec.Config, width: int) -> dict[str, tuple]:
    """Dotted name -> (dimension names and sizes) of every parameter an attention holds."""
    build = attention.TABLE[section.KIND]
    made: Any = nn.define(lambda keys: build(section, width, keys))
    found = {}
    pairs = ((made.shapes, made.dims), (made.price_shapes, made.price_dims))
    for shapes, dims in pairs:
        names = jax.tree.leaves(dims, is_leaf=lambda d: isinstance(d, tuple))
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        for (path, leaf), dim in zip(leaves, names, strict=True):
            key = ".".join(str(getattr(k, "key", k)) for k in path)
            found[key] = tuple(f"{d}={n}" for d, n in zip(dim, leaf.shape, strict=True))
    return found


def model_of(model: lm.Config, phase: Phase) -> lm.Config:
    """The model with the phase's attention and its weight of MTP."""
    blocks = {
        name: dataclasses.replace(block, attention=phase.attention.get(name, block.attention))
        for name, block in model.blocks.items()
    }
    weight = model.mtp.weight if phase.mtp_weight is None else phase.mtp_weight
    ahead = dataclasses.replace(model.mtp, weight=weight)
    return dataclasses.replace(model, blocks=blocks, mtp=ahead)


def _kinds(model: lm.Config) -> list[str]:
    return sorted({layer.attention.KIND for layer in model.layer_list})


def _has_prices(model: lm.Config) -> bool:
    known = dataclasses.replace(model, vocab=max(model.vocab, 2))  # which the data may yet tell
    return bool(jax.tree.leaves(lm.define(known).price_shapes))


def _routers(model: lm.Config) -> list[str]:
    routers = (getattr(layer.ffn, "router", None) for layer in model.layer_list)
    return sorted({router.KIND for router in routers if router is not None})


# --- in a run of known length ---


def stages(
    phases: Mapping[str, Phase], model: lm.Config, seq: int, *, steps: int, tokens_per_step: int
) -> tuple[Stage, ...]:
    """The phases of a run in their order; before the first one the configuration itself.

    A phase holds from the first step on that starts at or past its `start`.
    Errors: ValueError naming the phase when two begin at one step, or one not inside the run.
    """
    begins: dict[int, str] = {}
    for name, phase in sorted(phases.items(), key=lambda item: item[1].start):
        path, run = f"phases.{name}.start", f"{steps} steps of {tokens_per_step} tokens"
        spec.require(
            phase.start < 1 or phase.start >= tokens_per_step,
            f"{path}: {phase.start:g} tokens is less than one step of {tokens_per_step} tokens "
            "(data.batch x data.seq); give tokens, or a fraction of the run below 1",
        )
        exact = schedules.tokens(phase.start, steps * tokens_per_step) / tokens_per_step
        first = math.ceil(exact - 1e-6)  # a fraction of the run is a whole step only to rounding
        spec.require(
            first < steps,
            f"{path}: {phase.start:g} is not before the end of the run, {run} (data.batch x "
            "data.seq)",
        )
        spec.require(
            first not in begins,
            f"{path}: {phase.start:g} begins at the same step as phases.{begins.get(first)}, "
            f"{first} of {run} (data.batch x data.seq)",
        )
        begins[first] = name
    order = sorted(({} if 0 in begins else {0: BASE}) | begins)
    ends = [*order[1:], steps]
    found = []
    for first, end in zip(order, ends, strict=True):
        phase = phases.get(begins.get(first, ""), Phase(start=0.0))
        name = begins.get(first, BASE)
        trained = model_of(model, phase)
        row = phase.seq or seq
        found.append(Stage(name, first, end - first, trained, row, phase.train, phase.lr))
    return tuple(found)


def learning(found: tuple[Stage, ...]) -> int:
    """Steps until the last weight moves: what a schedule of the rate goes by.

    Phases that only settle prices come after its end, not within it.
    """
    weights = [stage for stage in found if stage.train != "prices"]
    last = weights[-1] if weights else found[-1]
    return last.first + last.steps


def at(found: tuple[Stage, ...], step: int) -> Stage:
    """The stage of a step, of which 1 is the first; before it the first one."""
    return [s for s in found if s.first < max(step, 1)][-1]


def scaled(schedule: schedules.Schedule, found: tuple[Stage, ...]) -> schedules.Schedule:
    """The schedule times each stage's `lr`; one function for all, so that none is compiled anew."""
    if all(stage.lr == 1.0 for stage in found):
        return schedule

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        factor = jnp.float32(found[0].lr)
        for stage in found[1:]:
            factor = jnp.where(jnp.asarray(step) >= stage.first, jnp.float32(stage.lr), factor)
        return schedule(step) * factor

    return rate
