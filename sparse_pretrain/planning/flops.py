"""Parameters, FLOPs and cache bytes of a model, from its configuration alone."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_pretrain import attention
from sparse_pretrain.model import ffn, lm


class Counts(NamedTuple):
    """Parameters: all, touched by a token without and with the input embedding."""

    total: int
    active: int
    active_with_embedding: int


def parameters(config: lm.Config) -> Counts:
    """Parameter counts, from the abstract model.

    `active` leaves out the input embedding (a look-up, no FLOPs) and the routed experts a token
    did not choose; a tied head counts, since it is multiplied with. Copies of experts do not.
    """
    shapes = jax.tree.leaves(lm.define(config).shapes)
    total = sum(math.prod(s.shape) for s in shapes)
    total -= sum(
        ffn.TABLE[layer.ffn.KIND].copied(layer.ffn, config.width) for layer in config.layer_list
    )
    idle = sum(
        ffn.TABLE[layer.ffn.KIND].inactive(layer.ffn, config.width) for layer in config.layer_list
    )
    embedding = config.vocab * config.width
    active = total - idle - (0 if config.tied else embedding)
    return Counts(total, active, active + (0 if config.tied else embedding))


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
    layers = config.layer_list if tokens else ()
    return sum(ffn.TABLE[x.ffn.KIND].padding(x.ffn, config.width, tokens) for x in layers)


def recomputed(config: lm.Config, length: int, tokens: int = 0) -> float:
    """Forward FLOPs per token that the backward pass does again, by the remat policy.

    Only repeats of the pattern are rematerialised, not the prefix. `full` does all again but the
    product that ends a repeat, whose result no gradient reads; `dots` the attention core and the
    routed experts, whose products have batch dims.
    """
    if config.remat == "none":
        return 0.0
    total = 0.0
    for at, name in enumerate(config.pattern, 1):
        section = config.blocks[name]
        feed, mixer = ffn.TABLE[section.ffn.KIND], attention.TABLE[section.attention.KIND]
        work = mixer.work(section.attention, config.width, length)
        total += work.core + feed.work(section.ffn, config.width)
        total += feed.padding(section.ffn, config.width, tokens) if tokens else 0.0
        if config.remat == "dots":
            total -= feed.plain(section.ffn, config.width)
        else:
            last = at == len(config.pattern)
            total += work.linear - (feed.unread(section.ffn, config.width) if last else 0.0)
    return config.repeats * total


def kv_bytes_per_token(config: lm.Config) -> int:
    """Decode cache per token over all layers, held in the model's dtype."""
    elements = sum(
        attention.TABLE[x.attention.KIND].kv_elements(x.attention, config.width)
        for x in config.layer_list
    )
    return elements * jnp.dtype(lm.DTYPES[config.dtype]).itemsize
