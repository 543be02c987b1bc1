"""Bytes that a step sends over each axis of a mesh, and how long its links take for them."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparse_pretrain import nn
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips, work
from sparse_pretrain.sharding import plans, ring, zigzag

FLOAT32, BFLOAT16 = 4, 2
WEIGHT_PASSES = 2  # the backward pass gathers weights again, once for all that it does
# Parameters that layers read in float32, and that are gathered so: routers, the mixing of streams,
# short convolutions. All others are gathered in the compute dtype (sharding/gather.py).
FULL = (("D", "E"), ("RD", "Mix"), ("W", "D"))
GATHER, EXCHANGE = "gather", "exchange"
RINGS = ("full", "sliding", "mla")  # attentions whose keys can go round a ring


class Message(NamedTuple):
    """What one chip receives over `axis` in a step, as `kind` of collective. Units: bytes."""

    axis: str
    kind: str
    what: str
    size: float


class Load(NamedTuple):
    """What a chip works on. Units: `tokens` of a micro-batch on one chip, `micro` of them a step;
    `passes` in which tokens are exchanged: 2, or 3 where the forward pass is redone;
    `sent` bytes of a number on its way to an expert; `length` tokens of a row, over all chips, and
    `context`, how its keys travel.
    """

    tokens: float
    micro: int
    passes: int
    sent: int = BFLOAT16
    length: int = 0
    context: str = "auto"


def messages(
    config: lm.Config,
    definition: nn.Definition,
    plan: plans.Plan,
    sizes: Mapping[str, int],
    load: Load,
) -> list[Message]:
    """All that one chip receives in a step, by axis."""
    out = [
        m._replace(size=m.size * (load.micro if m.what == "parameters" else 1))
        for m in parameters(config, definition, plan, sizes)
    ]
    return out + activations(config, sizes, load)


def activations(config: lm.Config, sizes: Mapping[str, int], load: Load) -> list[Message]:
    """What grows with the tokens: activations, tokens on their way to experts, keys and values."""
    out: list[Message] = []
    tokens, width = load.tokens * load.micro, config.width
    n = {axis: sizes.get(axis, 1) for axis in plans.AXES}
    layers = config.layer_list
    stage = 1 / n["pipe"]  # of the layers, on one chip
    if n["tensor"] > 1:
        # after attention and after the feed-forward, forward and backward, a sum each: twice
        size = 4 * 2 * BFLOAT16 * width * tokens * (n["tensor"] - 1) * len(layers) * stage
        out.append(Message("tensor", GATHER, "activations", size))
    if n["expert"] > 1:
        # a token goes once to each group it may use, where groups are limited (2412.19437, 3.2.2)
        seats = sum(_copies(s.ffn) for s in layers if s.ffn.KIND == "moe") * stage
        size = load.passes * (load.sent + BFLOAT16) * width * seats * tokens
        out.append(Message("expert", EXCHANGE, "tokens", size * (1 - 1 / n["expert"])))
    if n["context"] > 1:
        numbers = 0.0
        for section in (s.attention for s in layers):
            parts, rings = turns(section, config, sizes, load)
            # gathered once for a backward pass that redoes the forward one, gradients in their
            # dtype; or sent round in each pass, and their gradients in float32
            each = load.passes * BFLOAT16 + (FLOAT32 if rings else 0)
            numbers += key_elements(section, width) * (parts - 1) * each
            if rings and zigzag.serves(_ring(section, sizes, load)):
                # to the chunks' places and back: queries, keys, values and o, or their gradients
                dealt = key_elements(section, width) + query_elements(section, width)
                numbers += dealt * load.passes * BFLOAT16 * (1 - 1 / n["context"])
        size = numbers * stage * tokens / n["tensor"]
        out.append(Message("context", GATHER, "keys and values", size))
    cut = [axis for axis in ("fsdp", "expert", "context") if n[axis] > 1]
    if config.memory.layers and cut:
        # every part of a table sends what it has for each token, zeros but from one of them
        parts, read = math.prod(n[axis] for axis in cut), config.memory.width
        size = load.passes * BFLOAT16 * read * len(config.memory.layers) * tokens * (parts - 1)
        out.append(Message("+".join(cut), GATHER, "rows of memories", size))
    if n["pipe"] > 1:
        out.append(Message("pipe", EXCHANGE, "activations", 2 * BFLOAT16 * width * tokens))
    return [m for m in out if m.size > 0]


def parameters(
    config: lm.Config, definition: nn.Definition, plan: plans.Plan, sizes: Mapping[str, int]
) -> list[Message]:
    """Weights gathered and their gradients scattered in a micro-batch, or summed once a step.

    Gradients travel in float32, weights as `sent`; the head is read once, its gradient made beside
    the loss, and a table that is no head is looked up where it lies.
    """
    gathered: dict[tuple[str, ...], float] = {}
    summed = 0.0
    for dims, shape in work.weights(definition):
        used = math.prod(shape) / cuts(plan, sizes, dims, shape, "used")
        held = math.prod(shape) / cuts(plan, sizes, dims, shape, "stored")
        if held < used:
            over = _added(plan, sizes, dims, shape)
            each = passes(config, dims) * sent(config, dims) + FLOAT32 * gathers(config, dims)
            size = (used - held) * each
            gathered[over] = gathered.get(over, 0.0) + size
        cut = axes(plan, sizes, dims, shape, "stored")
        alike = [a for a in (*plan.batch, "context") if a in sizes and a not in cut]
        if math.prod(sizes[a] for a in alike) > 1:
            summed += 2 * FLOAT32 * held  # once a step
    out = [Message("+".join(names), GATHER, "parameters", b) for names, b in gathered.items()]
    if summed:
        names = [a for a in (*plan.batch, "context") if sizes.get(a, 1) > 1]
        out.append(Message("+".join(names), GATHER, "gradients", summed))
    return out


def gathers(config: lm.Config, dims: tuple[str, ...]) -> bool:
    """Whether a parameter that lies in parts is put together: all but look-ups' tables."""
    return dims[0] != "Row" and (config.tied or dims != ("V", "D"))


def passes(config: lm.Config, dims: tuple[str, ...]) -> int:
    """How often a parameter that lies in parts is gathered in a micro-batch."""
    head = ("V", "D") if config.tied else ("D", "V")
    return (1 if dims == head else WEIGHT_PASSES) * gathers(config, dims)


def sent(config: lm.Config, dims: tuple[str, ...]) -> int:
    """Bytes of a number of a parameter on its way to its readers."""
    inner = tuple(d for d in dims if d != "N")
    return FLOAT32 if inner in FULL else jnp.dtype(lm.DTYPES[config.dtype]).itemsize


def cuts(plan: plans.Plan, sizes: Mapping[str, int], dims, shape, use: str) -> int:
    """How many parts a parameter is cut into."""
    return math.prod(sizes.get(a, 1) for a in axes(plan, sizes, dims, shape, use))


def axes(plan: plans.Plan, sizes: Mapping[str, int], dims, shape, use: str) -> frozenset[str]:
    """The axes that cut a parameter."""
    return _axes(plan.name, tuple(sizes.items()), tuple(dims), tuple(shape), use)


@functools.lru_cache(2**16)  # asked for each leaf of each candidate
def _axes(plan: str, sizes: tuple, dims: tuple, shape: tuple, use: str) -> frozenset[str]:
    laid = plans.parameter(plans.find(plan), dict(sizes), dims, shape, use=use)
    names = (e if isinstance(e, tuple) else (e,) if e else () for e in laid)
    return frozenset(itertools.chain(*names))


def _added(plan, sizes, dims, shape) -> tuple[str, ...]:
    """The axes that a parameter is gathered over."""
    used, stored = (axes(plan, sizes, dims, shape, use) for use in ("used", "stored"))
    return tuple(a for a in plans.AXES if a in stored - used)


def _copies(section: Any) -> int:
    groups = getattr(section.router, "groups", 1)
    return min(section.top_k, section.router.groups_kept) if groups > 1 else section.top_k


def key_elements(section: Any, width: int) -> int:
    """Numbers per token that a context-parallel layer gathers: keys and values of all heads."""
    if hasattr(section, "nope_dim"):  # latents, expanded before they are sent
        return section.heads * (section.nope_dim + section.rope_dim + section.v_dim)
    if hasattr(section, "sizes"):
        _, heads, dim = section.sizes(width)
        return 2 * heads * dim
    return 2 * width


def query_elements(section: Any, width: int) -> int:
    """Numbers per token of all queries and of what they read."""
    if hasattr(section, "nope_dim"):
        return section.heads * (section.nope_dim + section.rope_dim + section.v_dim)
    heads, _, dim = section.sizes(width)
    return 2 * heads * dim


def _ring(section: Any, sizes: Mapping[str, int], load: Load) -> ring.Ring:
    """The ring that a layer's keys go round in."""
    devices, window = sizes.get("context", 1), getattr(section, "window", None)
    rows = load.length // devices
    found = ring.turns(devices, rows, window=window)
    return ring.Ring("context", devices, found, rows, (("window", window),))


def turns(
    section: Any, config: lm.Config, sizes: Mapping[str, int], load: Load
) -> tuple[int, bool]:
    """(of how many parts of a row a part has the keys, whether they go round a ring for that)."""
    devices = sizes.get("context", 1)
    if section.KIND not in RINGS or load.length % devices:
        return devices, False
    found = _ring(section, sizes, load).turns
    size = key_elements(section, config.width) * load.tokens / sizes.get("tensor", 1)
    size *= jnp.dtype(lm.DTYPES[config.dtype]).itemsize
    rings = devices > 1 and ring.serves(load.context, found, devices, int(size))
    return (found, True) if rings else (devices, False)


def seconds(message: Message, chip: chips.Chip, sizes: Mapping[str, int]) -> float:
    """How long the links take: those within nodes, and for what leaves them the adapters.

    Neighbours along the mesh's last axes share nodes. A gather crosses between nodes once per
    node, a part by each chip of it; in an exchange every chip sends its own.
    """
    names = message.axis.split("+")
    members = math.prod(sizes.get(a, 1) for a in names)
    last = max(plans.AXES.index(a) for a in names)
    closer = math.prod(sizes.get(a, 1) for a in plans.AXES[last + 1 :])
    together = max(min(chip.node // closer, members), 1)  # of the members, in one node
    within = message.size * (together - 1) / max(members - 1, 1) / chip.inside
    if together >= members:
        return within
    away = message.size * (members - together) / (members - 1)
    if message.kind == GATHER:
        return message.size / chip.inside * (together > 1) + away / together / chip.between
    return within + away / chip.between
