"""The language model one token at a time, against a cache."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain import nn
from sparse_pretrain.model import block, lm, precision, residual
from sparse_pretrain.shapes import AnyArray, Position


def init_cache(model: lm.LM, batch: int, length: int) -> dict[str, Any]:
    """Room for `length` tokens in every layer's own cache; stacked layers lead with dim N."""
    c, dtype = model.config, lm.DTYPES[model.config.dtype]
    cache = {}
    for group, name in lm.main_names(c).items():
        sizes = block.cache_shapes(c.blocks[name], c.width, batch, length)
        lead = (c.repeats,) if group.startswith("stack_") else ()
        cache[group] = {k: jnp.zeros((*lead, *size), dtype) for k, size in sizes.items()}
    return cache


@precision.kept
def decode(
    model: lm.LM, token_B: Int[AnyArray, " B"], cache: dict[str, Any], position: Position
) -> tuple[Float[Array, "B V"], dict]:
    """Logits [B, V] float32 after `token_B` at `position` [], and the cache that holds it."""
    c, dtype = model.config, lm.DTYPES[model.config.dtype]
    x = nn.read(model.embedding)[token_B[:, None]].astype(dtype)
    x, new = residual.spread(c.residual, x), dict(cache)
    for i in range(len(c.prefix)):
        name = f"prefix_{i}"
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

        stacks = [getattr(model, name) for name in names]
        x, out = nn.scan_layers(
            nn.layers(stacks, repeat), x, scan=c.scan, extra=[cache[name] for name in names]
        )
        new |= dict(zip(names, out, strict=True))
    x = model.norm(x if model.end is None else model.end(x))[:, 0].astype(jnp.float32)
    head, layout = model.head_weight()
    logits = jnp.einsum("bd,dv->bv" if layout == "DV" else "bd,vd->bv", x, head)
    if c.softcap:
        logits = c.softcap * jnp.tanh(logits / c.softcap)
    return logits, new
