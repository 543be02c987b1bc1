"""What a token asks of a chip in training: FLOPs by class of op, and numbers moved between ops."""

import math
from typing import Any, NamedTuple

import jax

from sparse_pretrain import attention, nn
from sparse_pretrain.model import engram, ffn, lm


class Work(NamedTuple):
    """Per token, forward and backward; `elements` are numbers that products read and write.

    `linear` products with weights, `experts` those of routed experts, `head` the output matrix,
    `core` attention's products without weights, under a causal mask. Units: FLOPs, multiply-add 2.
    """

    linear: float
    experts: float
    head: float
    core: float
    elements: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.linear + self.experts + self.head + self.core

    def plus(self, other: "Work") -> "Work":
        """Both together."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


# A product's backward pass is two products; attention's core also rebuilds its scores
BACKWARD, CORE_BACKWARD = 2.0, 2.5


def of(config: lm.Config, definition: nn.Definition, length: int) -> Work:
    """Training work of the model at `length`, nothing done twice but attention's scores."""
    sections = [*config.layer_list, *config.mtp_list]
    forward = _forward(config, sections, length)
    head = 2.0 * config.width * config.vocab * (1 + config.mtp.depth)
    linear = forward.linear + sum(2 * x.conv * config.width for x in sections)
    linear += 4.0 * config.width**2 * config.mtp.depth  # the join
    linear += engram.work(config.memory, config.width, config.residual.streams)
    return Work(
        (1 + BACKWARD) * linear,
        (1 + BACKWARD) * forward.experts,
        (1 + BACKWARD) * head,
        (1 + CORE_BACKWARD) * forward.core,
        (1 + BACKWARD) * elements(config, definition),
    )


def again(config: lm.Config, length: int, remat: str) -> Work:
    """The products that the backward pass does a second time, `config.remat` aside.

    The traffic between them is not counted twice: what runs redo of it is in the constant that
    was fitted to runs that all redid norms and activations.
    """
    if remat == "none" or not config.repeats:
        return Work(0.0, 0.0, 0.0, 0.0, 0.0)
    forward = _forward(config, [config.blocks[name] for name in config.pattern], length)
    linear = 0.0
    if remat == "full":
        linear = config.repeats * forward.linear
        linear += engram.work(config.memory, config.width, config.residual.streams)
    return Work(linear, config.repeats * forward.experts, 0.0, config.repeats * forward.core, 0.0)


def _forward(config: lm.Config, sections: list[Any], length: int) -> Work:
    linear = experts = core = 0.0
    for section in sections:
        mixer, feed = attention.TABLE[section.attention.KIND], ffn.TABLE[section.ffn.KIND]
        work = mixer.work(section.attention, config.width, length)
        routed = routed_flops(section.ffn, config.width)
        linear += work.linear + feed.work(section.ffn, config.width) - routed
        experts += routed
        core += work.core_model
    return Work(linear, experts, 0.0, core, 0.0)


def routed_flops(section: Any, width: int) -> float:
    """Forward FLOPs per token of a feed-forward section's routed experts."""
    return 6.0 * width * section.hidden * section.top_k if section.KIND == "moe" else 0.0


def elements(config: lm.Config, definition: nn.Definition) -> float:
    """Numbers that a token's forward products read and write, the embedding's and head's aside."""
    total = 0.0
    for group, name in lm.layer_names(config).items():
        section, times = config.blocks[name], config.repeats if group.startswith("stack_") else 1
        seats = section.ffn.top_k if section.ffn.KIND == "moe" else 1
        for dims, shape in weights(definition, group):
            inner = [(d, n) for d, n in zip(dims, shape, strict=True) if d not in ("N", "E")]
            if len(inner) < 2:
                continue
            sizes = [n for _, n in inner]
            into = math.prod(sizes[:-1]) if inner[-1][0] == "D" else sizes[0]
            out = math.prod(sizes) // into
            total += times * (seats if "E" in dims else 1) * (into + out)
    return total + engram.kept(config.memory, config.width, config.residual.streams)


def weights(definition: nn.Definition, group: str = "") -> list[tuple[tuple[str, ...], tuple]]:
    """(dims, shape) of every parameter, or of those of one group of layers."""
    dims, shapes = definition.dims, definition.shapes
    if group:
        dims, shapes = dims[group], shapes[group]
    names = jax.tree.leaves(dims, is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree.leaves(shapes)
    return [(d, tuple(x.shape)) for d, x in zip(names, leaves, strict=True)]
