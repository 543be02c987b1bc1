"""Bytes a training step holds, by kind: the state's exactly, the rest an estimate."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_pretrain import attention, nn, optim, spec
from sparse_pretrain.model import block, engram, ffn, lm


def training_bytes(
    config: lm.Config, tokens_per_step: int, *, optimizer: spec.Config, ema: bool
) -> dict[str, int]:
    """Bytes by kind on one device.

    Parameters, prices, their average and what the optimizer keeps are counted on the abstract
    state; gradients are like the parameters. Activations are an estimate of what the remat policy
    keeps, in the compute dtype, and of one repeat of the pattern that is being recomputed.
    Units: `tokens_per_step` of one micro-batch.
    """
    definition = lm.define(config)
    parameters = held(definition.shapes)
    parts = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": held(_optimizer_state(definition, optimizer)),
        "average": parameters if ema else 0,
        "prices": held(definition.price_shapes),
        "activations": _activations(config) * tokens_per_step,
    }
    return parts | {"total": sum(parts.values())}


def held(tree: Any) -> int:
    """Bytes of the arrays in a tree, which may be abstract."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _optimizer_state(definition: nn.Definition, optimizer: spec.Config) -> Any:
    build = optim.TABLE[optimizer.KIND].build
    rule = build(optimizer, definition.dims, lambda step: jnp.zeros(()))
    return jax.eval_shape(rule.init, definition.shapes)


def _activations(config: lm.Config) -> int:
    """Bytes per token."""
    prefix, pattern = ([config.blocks[n] for n in x] for x in (config.prefix, config.pattern))
    mixed = _mixed(config)
    whole = sum(_whole(b, config.width) + mixed for b in pattern)
    kept, again = config.repeats * whole, 0
    if config.remat != "none" and config.repeats:
        products = sum(_products(b, config.width) for b in pattern)
        each = config.width * config.residual.streams + (products if config.remat == "dots" else 0)
        kept, again = config.repeats * each, whole
    for section in config.mtp_list:  # its layer; the join's inputs; its own and the last norm's
        whole, ends = _whole(section, config.width) + mixed + 3 * config.width, 2 * config.width
        products = _products(section, config.width) + config.width
        if config.remat == "none":
            kept += whole + ends
        else:
            kept += ends + 2 * config.width + (products if config.remat == "dots" else 0)
            again = max(again, whole)
    elements = sum(_whole(b, config.width) + mixed for b in prefix) + kept + again
    if config.remat == "none":
        elements += engram.kept(config.memory, config.width, config.residual.streams)
    return elements * jnp.dtype(lm.DTYPES[config.dtype]).itemsize


def _mixed(config: lm.Config) -> int:
    """What two sites keep besides one stream: the others, their sums, and how they are mixed."""
    c: Any = config.residual
    if c.streams == 1:
        return 0
    # Sinkhorn's steps, or the permutations' weights, and the matrix; float32
    numbers = c.iterations * c.streams**2 if c.mixing == "sinkhorn" else c.logits + c.streams**2
    steps = 4 * numbers // jnp.dtype(lm.DTYPES[config.dtype]).itemsize
    return 2 * (config.width * c.streams + steps)


def _whole(section: block.Config, width: int) -> int:
    """What a layer keeps per token without remat: its inputs, q, k, v, o, the hidden pair."""
    feed = section.ffn
    seats = 1 if feed.KIND == "dense" else feed.top_k + feed.shared
    rows = 0 if feed.KIND == "dense" else 2 * feed.top_k * width
    return 8 * width + 3 * feed.hidden * seats + rows


def _products(section: block.Config, width: int) -> int:
    """The results of a layer's products without batch dims, from their FLOPs at inputs of D."""
    mixer, feed = attention.TABLE[section.attention.KIND], ffn.TABLE[section.ffn.KIND]
    work = mixer.work(section.attention, width, 1).linear + feed.plain(section.ffn, width)
    return round(work / (2 * width))
