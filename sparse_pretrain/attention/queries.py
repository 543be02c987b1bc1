"""A layer's queries by chunks in the backward pass: what belongs to one chunk is all that is held.

Keys are made once for a row. Queries are made again from the layer's input, a chunk at a time, and
what attention gave is kept: so no array of queries, nor of a gradient of theirs, is as long as the
row, but the layer's input, its output and their gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_pretrain.model import layers
from sparse_pretrain.sharding import ops

# Of a part's arrays: those that gradients are for, and those that belong to queries.
TRAINED = ("k", "v", "kv", "sinks_H")
OF_QUERIES = ("segments_q", "ids_q", "blocks_BxLxGxN", "chosen_BxLxN")


def by_chunks(
    call: Callable,
    x_BxLxD: jax.Array,
    rows: Any,
    shared: Any,
    softmaxes: Sequence[tuple[Sequence[ops.Part], jax.Array, jax.Array]],
    size: int,
) -> Any:
    """`call(x, rows, shared, recall)` on chunks of `size` queries, the results joined along dim 1.

    `recall(i, q)` is what softmax i of `softmaxes`, (parts, o, lse), gave for the chunk's queries;
    its gradients are those of the parts. Those of `shared`, of keys and of the weights that `call`
    reads are added up over the chunks in float32 or wider. Spare queries of the last chunk are 0.

    Shapes: x and every array of `rows` [B, L, ...]; only x and what is shared have gradients.
    """
    keys, fixed, own, options = [], [], [], []
    for parts, o, lse in softmaxes:
        arrays = [{n: a for n, a in p.arrays.items() if a is not None} for p in parts]
        for a in arrays:
            if "segments_q" in a:
                a.setdefault("segments_k", a["segments_q"])
        keys.append([{n: x for n, x in a.items() if n in TRAINED} for a in arrays])
        known = {"o": o, "lse": lse}
        own.append(([{n: x for n, x in a.items() if n in OF_QUERIES} for a in arrays], known))
        apart = (*TRAINED, *OF_QUERIES)
        fixed.append([{n: x for n, x in a.items() if n not in apart} for a in arrays])
        options.append([(p.way, p.options) for p in parts])

    def chunk(x, trained, given, fixed, first):
        keys, shared = trained
        rows, own = given

        def recall(i, q):
            listed = zip(options[i], keys[i], own[i][0], fixed[i], strict=True)
            parts = []
            for (way, more), *arrays in listed:
                merged = {n: a for some in arrays for n, a in some.items()}
                if way in ("flash", "own_block"):
                    merged["first"] = first
                parts.append(ops.Part(way, merged, more))
            return ops.recall(q, parts, **own[i][1])

        return call(x, rows, shared, recall)

    given = jax.lax.stop_gradient((rows, own))
    example = jax.tree.map(lambda a: _cut(a, size)[0], (x_BxLxD, given))
    trained, first = (keys, shared), jnp.zeros((), jnp.int32)
    closed, weights = jax.closure_convert(chunk, example[0], trained, example[1], fixed, first)
    return _run(closed, size, x_BxLxD, (trained, weights), given, fixed)


def _cut(x_BxLxY, size):
    """[chunks, B, size, ...], with zeros for what is left over."""
    B, L = x_BxLxY.shape[:2]
    rest = x_BxLxY.shape[2:]
    x = jnp.pad(x_BxLxY, ((0, 0), (0, -L % size), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x.reshape(B, -1, size, *rest), 1, 0)


def _joined(x, length):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _firsts(x_BxLxD, size):
    return jnp.arange(0, x_BxLxD.shape[1], size, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(call, size, x, trained, given, fixed):
    trained, weights = trained

    def chunk(part):
        x, given, first = part
        return call(x, trained, given, fixed, first, *weights)

    cut = functools.partial(_cut, size=size)
    y = jax.lax.map(chunk, (cut(x), jax.tree.map(cut, given), _firsts(x, size)))
    return jax.tree.map(lambda part: _joined(part, x.shape[1]), y)


def _forward(call, size, x, trained, given, fixed):
    return _run(call, size, x, trained, given, fixed), (x, trained, given, fixed)


def _backward(call, size, kept, dy):
    # Without the barrier XLA sees what was computed before and keeps it alive.
    (x, trained, given, fixed), dy = jax.lax.optimization_barrier((kept, dy))

    def chunk(total, part):
        x, given, first, dy = part

        def again(x, trained):
            return call(x, trained[0], given, fixed, first, *trained[1])

        dx, more = jax.vjp(again, x, trained)[1](dy)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more), dx

    # Zeros that XLA cannot know: it would make known ones first, and keep them from then on.
    counted = sum(jnp.sum(y.reshape(-1)[:1] != 0, dtype=jnp.int32) for y in jax.tree.leaves(dy))

    def wide(x):
        dtype = layers.wide(x.dtype)
        return jnp.broadcast_to((counted < 0).astype(dtype), x.shape)

    cut = functools.partial(_cut, size=size)
    xs = (cut(x), jax.tree.map(cut, given), _firsts(x, size), jax.tree.map(cut, dy))
    total, dx = jax.lax.scan(chunk, jax.tree.map(wide, trained), xs)
    total = jax.tree.map(lambda a, b: a.astype(b.dtype), total, trained)
    return _joined(dx, x.shape[1]), total, None, None


_run.defvjp(_forward, _backward)
