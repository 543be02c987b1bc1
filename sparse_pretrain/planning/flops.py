"""Parameters, FLOPs and cache bytes of a model, from its configuration alone."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain import attention, nn
from sparse_pretrain.model import engram, ffn, lm, residual


class Counts(NamedTuple):
    """Parameters: all, touched by a token without and with the input embedding, MTP's of all."""

    total: int
    active: int
    active_with_embedding: int
    mtp: int = 0


def parameters(config: lm.Config, definition: nn.Definition | None = None) -> Counts:
    """Parameter counts, from the abstract model, which is its definition's where one is given.

    `active` leaves out the input embedding (a look-up, no FLOPs) and the routed experts a token
    did not choose, a memory's tables (look-ups too), and the modules of MTP, which only training
    runs; a tied head counts, since it is multiplied with. Copies of experts do not, nor a memory's
    rows that nothing points to.
    """
    shapes = (definition or lm.define(config)).shapes
    total, ahead = (
        sum(math.prod(s.shape) for s in jax.tree.leaves(part))
        for part in (shapes, [v for k, v in shapes.items() if k.startswith("mtp_")])
    )

    def over(what: str, sections: list) -> int:
        return sum(getattr(ffn.TABLE[x.ffn.KIND], what)(x.ffn, config.width) for x in sections)

    ahead -= over("copied", config.mtp_list)
    total -= over("copied", [*config.layer_list, *config.mtp_list])
    embedding = 0 if config.tied else config.vocab * config.width
    rows, unused = engram.looked_up(config.memory)
    total -= unused
    active = total - ahead - over("inactive", config.layer_list) - embedding - (rows - unused)
    return Counts(total, active, active + embedding, ahead)


class TrainFlops(NamedTuple):
    """Training FLOPs per token (forward and backward, multiply-add = 2).

    `executed` counts masked attention work, padding rows of experts and work redone by
    rematerialisation; `model` none of them.
    """

    model: float
    executed: float


def train_flops_per_token(config: lm.Config, length: int, tokens: int = 0) -> TrainFlops:
    """Three times the forward products; the attention core's backward recomputes its scores.

    Units: FLOPs per token at `length`; `tokens` of one (micro-)batch, for the experts' padding
    under even loads (0 leaves it out).
    """
    work = lm.work_per_token(config, length)
    model = 3 * (work.linear + work.core_model)
    executed = 3 * (work.linear + _padding(config, tokens)) + work.core + work.core_backward
    return TrainFlops(model, executed + recomputed(config, length, tokens))


def forward_flops_per_token(config: lm.Config, length: int, tokens: int = 0) -> TrainFlops:
    """Of a step that trains the attentions' indexers alone: the backward pass does not go further.

    Differs: the indexers' own backward, a few products of their width, is left out.
    """
    work = lm.work_per_token(config, length)
    padding = _padding(config, tokens)
    return TrainFlops(work.linear + work.core_model, work.linear + padding + work.core)


def _padding(config: lm.Config, tokens: int) -> float:
    layers = [*config.layer_list, *config.mtp_list] if tokens else []
    return sum(ffn.TABLE[x.ffn.KIND].padding(x.ffn, config.width, tokens) for x in layers)


def recomputed(config: lm.Config, length: int, tokens: int = 0) -> float:
    """Forward FLOPs per token that the backward pass does again, by the remat policy.

    Only repeats of the pattern, MTP's modules and memories are rematerialised, not the prefix.
    `full` does all again but the product that ends a repeat, whose result no gradient reads; `dots`
    the attention core and the routed experts, whose products have batch dims.
    """
    if config.remat == "none":
        return 0.0
    pattern = [config.blocks[name] for name in config.pattern]
    join = 4.0 * config.width**2 if config.remat == "full" else 0.0
    join += residual.TABLE[config.residual.KIND].head_work(config.residual, config.width)
    ahead = config.mtp.depth * (join + _again(config, config.mtp_list[:1], length, tokens))
    if config.remat == "full":
        ahead += engram.work(config.memory, config.width, config.residual.streams)
    return config.repeats * _again(config, pattern, length, tokens) + ahead


def _again(config: lm.Config, sections: list, length: int, tokens: int) -> float:
    """What these layers, rematerialised as one, do again."""
    carried = residual.TABLE[config.residual.KIND]
    total = 2 * len(sections) * carried.work(config.residual, config.width)
    for at, section in enumerate(sections, 1):
        feed, mixer = ffn.TABLE[section.ffn.KIND], attention.TABLE[section.attention.KIND]
        work = mixer.work(section.attention, config.width, length)
        total += work.core + feed.work(section.ffn, config.width)
        total += feed.padding(section.ffn, config.width, tokens) if tokens else 0.0
        if config.remat in ("dots", "offload"):
            total -= feed.plain(section.ffn, config.width)
        else:
            # with several streams the weight of a layer's output reads it
            last = at == len(sections) and config.residual.streams == 1
            total += work.linear - (feed.unread(section.ffn, config.width) if last else 0.0)
    return total


def kv_bytes_per_token(config: lm.Config) -> int:
    """Decode cache per token over all layers, held in the model's dtype."""
    elements = sum(
        attention.TABLE[x.attention.KIND].kv_elements(x.attention, config.width)
        for x in config.layer_list
    )
    return elements * jnp.dtype(lm.DTYPES[config.dtype]).itemsize
