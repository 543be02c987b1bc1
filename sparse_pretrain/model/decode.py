"""The language model one token at a time, against a cache."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain import nn
from sparse_pretrain.model import block, engram, lm, precision, residual
from sparse_pretrain.shapes import AnyArray, Position


def init_cache(model: lm.LM, batch: int, length: int) -> dict[str, Any]:
    """Room for `length` tokens in every layer's own cache; stacked layers lead with dim N."""
    c, dtype = model.config, lm.DTYPES[model.config.dtype]
    cache = {}
    for group, name in lm.main_names(c).items():
        sizes = block.cache_shapes(c.blocks[name], c.width, batch, length)
        lead = (c.repeats,) if group.startswith("stack_") else ()
        cache[group] = {k: jnp.zeros((*lead, *size), dtype) for k, size in sizes.items()}
    for k in range(len(c.memory.layers)):
        sizes = engram.cache_shapes(c.memory, c.width, c.residual.streams, batch)
        cache[f"memory_{k}"] = {k: jnp.zeros(size, dtype) for k, size in sizes.items()}
    return cache


@precision.kept
def decode(
    model: lm.LM,
    token_B: Int[AnyArray, " B"],
    cache: dict[str, Any],
    position: Position,
    memory: Int[AnyArray, "B A"] | None = None,
) -> tuple[Float[Array, "B V"], dict]:
    """Logits [B, V] float32 after `token_B` at `position` [], and the cache that holds it.

    `memory` are the rows that the token reads, where the model has memories.
    """
    c, dtype = model.config, lm.DTYPES[model.config.dtype]
    x = nn.read(model.embedding)[token_B[:, None]].astype(dtype)
    x, new = residual.spread(c.residual, x), dict(cache)

    def remember(layer, x):
        if layer not in c.memory.layers:
            return x
        assert memory is not None, "memory: the rows of the token are not given"
        place, reads = c.memory.layers.index(layer), c.memory.reads
        rows = memory[:, None, place * reads : (place + 1) * reads]
        name = f"memory_{place}"
        x, new[name]["past"] = getattr(model, name).decode(x, rows, cache[name]["past"])
        return x

    new |= {k: dict(v) for k, v in cache.items() if k.startswith("memory_")}
    for i in range(len(c.prefix)):
        name = f"prefix_{i}"
        x = remember(i, x)
        x, new[name] = getattr(model, name).decode(x, cache[name], position, token_B[:, None])
    if c.repeats:
        names = [f"stack_{i}" for i in range(len(c.pattern))]

        def repeat(modules, x, n, layer_cache):
            del n
            out = []
            for module, part in zip(modules, layer_cache, strict=True):
                x, part = module.decode(x, part, position, token_B[:, None])
                out.append(part)
            return x, out

        stack, outs = nn.layers([getattr(model, name) for name in names], repeat), []
        for first, last in itertools.pairwise(c.memory_cuts):
            x = remember(len(c.prefix) + first * len(c.pattern), x)
            past = [cache[name] for name in names]
            if (first, last) != (0, c.repeats):
                past = jax.tree.map(lambda a, i=first, j=last: a[i:j], past)
            x, out = nn.scan_layers(nn.part(stack, first, last), x, scan=c.scan, extra=past)
            outs.append(out)
        out = outs[0] if len(outs) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *outs)
        new |= dict(zip(names, out, strict=True))
    x = model.norm(x if model.end is None else model.end(x))[:, 0].astype(jnp.float32)
    head, layout = model.head_weight()
    logits = jnp.einsum("bd,dv->bv" if layout == "DV" else "bd,vd->bv", x, head)
    if c.softcap:
        logits = c.softcap * jnp.tanh(logits / c.softcap)
    return logits, new
