"""Text from a trained model, one token at a time against each layer's own cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_pretrain import nn
from sparse_pretrain.data import ngrams
from sparse_pretrain.model import decode, engram


def sample(
    logits_BxV: Float[Array, "B V"], key: jax.Array, temperature: float, top_p: float
) -> Int[Array, " B"]:
    """A token per row: the likeliest at temperature 0, else from the smallest set of mass top_p."""
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits = logits_BxV / temperature
    if top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        # keep every token whose more likely ones hold less than top_p
        count = jnp.sum(mass - jax.nn.softmax(descending, axis=-1) < top_p, axis=-1)
        least = jnp.take_along_axis(descending, count[:, None] - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _generate(definition, params, prices, prompt_P, tokens, temperature, top_p, key, found):
    model = definition.merge(params, prices)
    length = prompt_P.shape[0] + tokens
    memory = model.config.memory

    def step(carry, position):
        cache, token, key, last = carry
        rows = None
        if found is not None:  # the last tokens' ids, the newest first
            last = jnp.concatenate([found.ids[token][:, None], last], axis=1)
            rows = engram.hashed(memory, found, last)
            last = last[:, :-1]
        logits, cache = decode.decode(model, token, cache, position, rows)
        key, use = jax.random.split(key)
        sampled = sample(logits, use, temperature, top_p)
        known = prompt_P[jnp.minimum(position + 1, prompt_P.shape[0] - 1)]
        token = jnp.where(position + 1 < prompt_P.shape[0], known, sampled)
        return (cache, token, key, last), token[0]

    last = None
    if found is not None:
        last = jnp.broadcast_to(found.pad, (1, memory.orders[-1] - 1))
    carry = (decode.init_cache(model, 1, length), prompt_P[:1], key, last)
    _, out = jax.lax.scan(step, carry, jnp.arange(length - 1))
    return out[prompt_P.shape[0] - 1 :]


def generate(
    definition: nn.Definition,
    params,
    prices,
    tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The continuation of `prompt`: up to `tokens` tokens, cut at the end-of-text token.

    Errors: ValueError when tokens, temperature or top_p is out of range.
    """
    if tokens < 1:
        raise ValueError(f"tokens: must be at least 1, got {tokens}")
    if temperature < 0:
        raise ValueError(f"temperature: must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be in (0, 1], got {top_p}")
    ids = np.asarray(tokenizer.encode(prompt), np.int32)
    if tokenizer.eos is not None:
        ids = np.concatenate([[tokenizer.eos], ids])
    if not ids.size:
        raise ValueError("prompt: must not be empty with a tokenizer that has no end-of-text token")
    known = ngrams.addresses(definition.merge(params, prices).config.memory, tokenizer)
    found = None if known is None else jax.tree.map(jnp.asarray, known.on_device())
    out = _generate(
        definition,
        params,
        prices,
        jnp.asarray(ids, jnp.int32),
        tokens,
        float(temperature),
        float(top_p),
        jax.random.key(seed),
        found,
    )
    out = np.asarray(out)
    if tokenizer.eos is not None and (out == tokenizer.eos).any():
        out = out[: int(np.argmax(out == tokenizer.eos))]
    return tokenizer.decode(out)
