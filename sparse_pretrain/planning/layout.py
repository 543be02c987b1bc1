"""Bytes that one chip holds in a step under a plan, by kind, estimated before any compilation."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain import nn, optim, spec
from sparse_pretrain.model import engram, lm
from sparse_pretrain.planning import network, work
from sparse_pretrain.planning.memory import held
from sparse_pretrain.sharding import plans

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")

# copies of a repeat's values that its backward pass holds at once: read off compiled programs
# (experiments/benchmarks/compiled_memory.py)
WORKING = 2.5
# bytes of attention at work for each number of keys and values that it reads, a row's even where
# context parallelism holds a part of it: their gradients in float32, and copies in other orders
KEYS = 10.0
# the same of keys that go round a ring, of one part alone: as much as of 3.7 parts gathered, by
# the temporaries noted at sharding/ring.py's PARTS
RING_KEYS = 3.7 * KEYS

# of a pipeline's stage: arrays of all micro-batches' inputs under GPipe; of one micro-batch's on
# their way between stages under the other schedules; numbers that wait with ZB-H1's products for
# weights for each that products write, their inputs and gradients: read off compiled programs
# (experiments/benchmarks/pipeline_schedules.py)
PILES, STAGE, DELAYED = 3.0, 4.0, 1.55

# numbers kept without remat for each that a product writes: norms, rotations, gates and scores
# beside them; read off one program, DeepSeek-V3 on TPU v5p
KEPT = 2.4


class State(NamedTuple):
    """What there is to lay out: each parameter's dims and shape, and the optimizer's share.

    `optimizer` is how many times the parameters' bytes the optimizer and an average keep.
    """

    leaves: list[tuple[tuple[str, ...], tuple[int, ...]]]
    optimizer: float


def state(definition: nn.Definition, optimizer: spec.Config, *, ema: bool) -> State:
    """The state of a model and an optimizer, from their shapes."""
    build = optim.TABLE[optimizer.KIND].build
    rule = build(optimizer, definition.dims, lambda step: jnp.zeros(()))
    kept = held(jax.eval_shape(rule.init, definition.shapes)) / held(definition.shapes)
    return State(work.weights(definition), kept + ema)


def held_bytes(
    what: State, plan: plans.Plan, sizes: Mapping[str, int], micro: int
) -> dict[str, float]:
    """Parameters, gradients and optimizer on the fullest chip, all float32."""
    stored = kept = 0.0
    for dims, shape in what.leaves:
        size = 4.0 * math.prod(shape)
        stored += size / network.cuts(plan, sizes, dims, shape, "stored")
        kept += size / network.cuts(plan, sizes, dims, shape, "optimizer")
    # the optimizer's updates beside them; and with micro-batches their sum beside the last one's
    gradients = stored * (3 if micro > 1 else 2)
    return {"parameters": stored, "gradients": gradients, "optimizer": kept * what.optimizer}


class Outs(NamedTuple):
    """Numbers per token that products write: `cut` along a tensor axis, `whole` on each of its
    chips; the same of routed experts, whose rows are read in their order, which is a second copy.
    """

    cut: float
    whole: float
    routed_cut: float
    routed_whole: float

    def on_chip(self, sizes: Mapping[str, int], *, routed: bool = True) -> float:
        """Those one chip writes."""
        tensor = sizes.get("tensor", 1)
        own = self.cut / tensor + self.whole
        return own + (self.routed_cut / tensor + self.routed_whole if routed else 0.0)


class Shapes(NamedTuple):
    """What a token leaves behind in a repeat of the pattern, and in the layers beside it."""

    repeat: Outs
    beside: Outs
    width: int  # of the residual stream through a repeat, once a layer
    repeats: int


def shapes(config: lm.Config, definition: nn.Definition) -> Shapes:
    """What a token leaves behind in each layer."""
    outs = {g: _outs(config, definition, g) for g in lm.layer_names(config)}
    stack = [v for g, v in outs.items() if g.startswith("stack_")]
    other = [v for g, v in outs.items() if not g.startswith("stack_")]
    repeat, beside = (
        Outs(*(sum(v[i] for v in group) for i in range(4))) for group in (stack, other)
    )
    # two norms and two sums of each layer
    repeat = repeat._replace(whole=repeat.whole + 4 * config.width * len(stack))
    own = engram.kept(config.memory, config.width, config.residual.streams)
    beside = beside._replace(whole=beside.whole + 4 * config.width * len(other) + own)
    return Shapes(repeat, beside, config.width * max(len(stack), 1), config.repeats)


def _outs(config: lm.Config, definition: nn.Definition, group: str) -> Outs:
    section = config.blocks[lm.layer_names(config)[group]].ffn
    seats = section.top_k if section.KIND == "moe" else 0
    found = [0.0] * 4
    for dims, shape in work.weights(definition, group):
        inner = [(d, n) for d, n in zip(dims, shape, strict=True) if d != "N"]
        routed = seats and inner[0][0] == "E" and len(inner) == 3
        inner = inner[1:] if routed else inner
        if len(inner) < 2:
            continue
        last = inner[-1][0] == "D"
        out = inner[-1][1] if last else math.prod(n for _, n in inner[1:])
        cut = not last and bool({"H", "K", "F"} & {d for d, _ in inner[1:]})
        found[2 * bool(routed) + (not cut)] += (seats if routed else 1) * out
    found[3] += seats * config.width  # rows in the experts' order
    return Outs(*found)


def activation_bytes(
    found: Shapes,
    config: lm.Config,
    *,
    tokens: float,
    remat: str,
    sizes: Mapping[str, int],
    micro: int,
    pipeline: str = "1f1b",
) -> float:
    """What a chip keeps of its `tokens` of a micro-batch until the backward pass reads it.

    A pipeline's stage keeps the inputs of the micro-batches that its schedule has in flight, and
    all else of one, in its own layers only; under zero_bubble both sides of the products for
    weights that wait too. Rows that were sent to experts are not kept but sent again. Of
    remat=offload this is what stays on the chip.
    """
    stages = sizes.get("pipe", 1)
    here = sizes.get("expert", 1) == 1
    if remat == "none":
        kept = KEPT * found.repeat.on_chip(sizes, routed=here)
    elif remat == "dots":
        kept = found.repeat.on_chip(sizes, routed=False) - 3 * found.width
    else:
        kept = float(found.width)
    numbers = found.repeats * kept / stages + found.beside.on_chip(sizes, routed=here)
    if stages > 1:
        stream = config.width * getattr(config.residual, "streams", 1)
        flight = min(stages, micro)
        numbers += stream * (PILES * micro + stages if pipeline == "gpipe" else flight + STAGE)
        if pipeline == "zero_bubble":
            each = found.repeat.on_chip(sizes, routed=here) - 4 * found.width
            numbers += (flight + 1) * DELAYED * each * found.repeats / stages
    return numbers * tokens * jnp.dtype(lm.DTYPES[config.dtype]).itemsize


def weight_bytes(
    definition: nn.Definition, config: lm.Config, plan: plans.Plan, sizes: Mapping[str, int]
) -> float:
    """Gathered weights and their gradients before they are cut, of the largest that is at work.

    That is a repeat, a layer beside the stack, or the head.
    """
    itemsize = jnp.dtype(lm.DTYPES[config.dtype]).itemsize
    groups = [[n for n in definition.shapes if n.startswith("stack_")]]
    groups += [[n] for n in definition.shapes if not n.startswith("stack_")]
    largest = 0.0
    for names in groups:
        total = 0.0
        for dims, shape in (leaf for n in names for leaf in work.weights(definition, n)):
            stacked = dims[0] == "N"
            inner, sides = dims[stacked:], shape[stacked:]
            cut = {u: network.cuts(plan, sizes, inner, sides, u) for u in ("used", "stored")}
            looked_up = inner in (("V", "D"), ("Row", "Dm"))  # where they lie
            if cut["used"] == cut["stored"] or looked_up:
                continue
            total += math.prod(sides) / cut["used"] * (itemsize + 4)
        largest = max(largest, total)
    return largest


def working_bytes(
    found: Shapes, config: lm.Config, *, load: network.Load, sizes: Mapping[str, int]
) -> float:
    """What a repeat at work holds, forward values, their gradients and float32 sums."""
    itemsize = jnp.dtype(lm.DTYPES[config.dtype]).itemsize
    values = WORKING * found.repeat.on_chip(sizes) * itemsize
    keys = 0.0
    for section in {id(s.attention): s.attention for s in config.layer_list}.values():
        parts, rings = network.turns(section, config, sizes, load)
        held = RING_KEYS if rings else KEYS * parts
        keys = max(keys, held * network.key_elements(section, config.width))
    return (values + keys / sizes.get("tensor", 1)) * load.tokens
