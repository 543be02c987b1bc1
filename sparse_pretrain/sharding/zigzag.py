"""The ring with as much work for every device: each has an early and a late chunk of the row.

Under a causal mask the last of n parts reads n parts and the first one. So a row is cut in 2n
chunks, and the device that has part i works on chunks i and 2n - 1 - i. Of any two devices' keys
and queries just two of the four pairs of chunks are read, and those whole: the late queries read
the early keys, and beside them either the early queries do (of the earlier of the two devices) or
the late queries read the late keys too. A device's own chunks are a row with a hole, which a
causal mask reads as it is. Nothing is left to a loop whose length a device decides: all run the
same products, 2n pairs of chunks, where the last device of the plain ring runs 4n - 2.

Chunks are sent to their place and results back: queries, keys, values and o, each once, and their
gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash import flash as _flash
from kernels_pallas.flash.xla import part_gradients
from kernels_pallas.rounding import narrow
from sparse_pretrain.sharding.ring import Ring, merge, send, sink_gradient, with_sinks


def serves(ring: Ring) -> bool:
    """Whether this ring's parts have unequal work, and can be cut in two."""
    options = dict(ring.options)
    causal = options.get("causal", True) and options.get("window") is None
    return causal and ring.devices > 1 and ring.rows % 2 == 0


def place(devices: int, chunk: int) -> int:
    """The device that works on this of 2 x devices chunks."""
    return chunk if chunk < devices else 2 * devices - 1 - chunk


def pairs(devices: int, me: int) -> list[tuple[int, int]]:
    """The (queries' chunk, keys' chunk) that device `me` multiplies, in order of its turns.

    Those of a chunk with itself are read by half.
    """
    low, high = me, 2 * devices - 1 - me
    out = [(low, low), (high, low), (high, high)]
    for turn in range(1, devices):
        other = (me - turn) % devices
        out.append((high, other))
        out.append((low, other) if turn <= me else (high, 2 * devices - 1 - other))
    return out


def attend(ring: Ring, q, k, v, segments_q, segments_k, sinks):
    """As `ring.attend`; in shard_map.

    Source: striped and zig-zag orders of Ring Attention's parts, 2311.09431 and 2407.21783
        (section 3.3.2, whose 2 x CP chunks these are).
    """
    return _attend(ring, q, k, v, segments_q, segments_k, sinks)


def dealt(ring: Ring, tree: Any) -> Any:
    """Parts [B, rows, ..] of a row to chunks, [early, late]."""
    n, c = ring.devices, ring.rows // 2
    even = jax.lax.axis_index(ring.axis) % 2 == 0
    first = [(i, place(n, 2 * i)) for i in range(n)]
    second = [(i, place(n, 2 * i + 1)) for i in range(n)]

    def one(x):
        # chunks of even number and those of odd number: a device gets one of each
        a = jax.lax.ppermute(x[:, :c], ring.axis, first)
        b = jax.lax.ppermute(x[:, c:], ring.axis, second)
        return jnp.concatenate([jnp.where(even, a, b), jnp.where(even, b, a)], axis=1)

    return jax.tree.map(one, tree)


def home(ring: Ring, tree: Any) -> Any:
    """Chunks back to parts: `dealt` undone."""
    n, c = ring.devices, ring.rows // 2
    even = jax.lax.axis_index(ring.axis) % 2 == 0
    first = [(place(n, 2 * i), i) for i in range(n)]
    second = [(place(n, 2 * i + 1), i) for i in range(n)]

    def one(x):
        early, late = x[:, :c], x[:, c:]
        a = jax.lax.ppermute(jnp.where(even, early, late), ring.axis, first)
        b = jax.lax.ppermute(jnp.where(even, late, early), ring.axis, second)
        return jnp.concatenate([a, b], axis=1)

    return jax.tree.map(one, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q, k, v, segments, others, sinks):
    return _forward(ring, q, k, v, segments, others, sinks)[0]


def _halves(ring: Ring, tree):
    """(the early chunk, the late chunk) of every array, None where the tree has it."""
    c = ring.rows // 2
    return jax.tree.map(lambda x: x[:, :c], tree), jax.tree.map(lambda x: x[:, c:], tree)


def _both(a, b):
    """Two trees of chunks as one batch."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _pick(which, a, b):
    return jax.tree.map(lambda x, y: jnp.where(which, x, y), a, b)


def _forward(ring, q, k, v, segments, others, sinks):
    q, k, v, segments, others = dealt(ring, (q, k, v, segments, others))
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    options = dict(ring.options) | {"return_lse": True}
    me, B = jax.lax.axis_index(ring.axis), q.shape[0]
    early, late = _halves(ring, (q, segments))

    def add(total, keys, turn):
        """Two pairs of chunks, as one batch."""
        before, after = total
        near, far = _halves(ring, keys)
        earlier = turn <= me
        (q, segments) = _both(late, _pick(earlier, early, late))
        (k, v, others) = _both(near, _pick(earlier, near, far))
        o, lse = _flash(
            q, k, v, segments_q=segments, segments_k=others, **options | {"causal": False}
        )
        found = o.astype(wide), lse
        after = merge(after, tuple(x[:B] for x in found))
        merged = merge(_pick(earlier, before, after), tuple(x[B:] for x in found))
        return _pick(earlier, merged, before), _pick(earlier, after, merged)

    def one(carry, turn):
        keys, total = carry
        return (send(ring, keys, 1), add(total, keys, turn)), None

    keys = (k, v, others)
    ahead = send(ring, keys, 1)
    o, lse = _flash(q, k, v, segments_q=segments, segments_k=others, **options)
    carry = ahead, _halves(ring, (o.astype(wide), lse))
    last = ring.devices - 1
    if last > 1:
        carry, _ = jax.lax.scan(one, carry, jnp.arange(1, last, dtype=jnp.int32))
    keys, total = carry
    total = add(total, keys, jnp.int32(last))
    o, lse = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *total)
    o, lse = with_sinks(o, lse, sinks)
    o = narrow(o, v.dtype)
    return home(ring, (o, lse)), (q, keys, segments, sinks, o, lse)


def _backward(ring, kept, gradients):
    d_o, d_lse = dealt(ring, gradients)
    # without the barrier XLA sees that the scores were computed before and keeps them alive
    (q, keys, segments, sinks, o, lse), d_o = jax.lax.optimization_barrier((kept, d_o))
    delta = jnp.sum(d_o.astype(lse.dtype) * o.astype(lse.dtype), axis=-1) - d_lse
    options = dict(ring.options) | {"first": None}
    me, B = jax.lax.axis_index(ring.axis), q.shape[0]
    early, late = _halves(ring, (q, segments, d_o, lse, delta))

    def joined(pair):
        """[B, rows, ..] of chunks (early, late)."""
        return jnp.concatenate(pair, axis=1)

    def part(keys, turn):
        near, far = _halves(ring, keys)
        earlier = turn <= me
        q, segments, d_o, lse, delta = _both(late, _pick(earlier, early, late))
        k, v, others = _both(near, _pick(earlier, near, far))
        found = part_gradients(
            q, k, v, d_o, lse, delta, segments_q=segments, segments_k=others,
            **options | {"causal": False},
        )  # fmt: skip
        dq, *of_keys = [(x[:B], x[B:]) for x in found]
        none = jnp.zeros_like(dq[1])
        dq = joined((jnp.where(earlier, dq[1], none), dq[0] + jnp.where(earlier, none, dq[1])))
        out = []
        for always, other in of_keys:
            none = jnp.zeros_like(other)
            near = always + jnp.where(earlier, other, none)
            out.append(joined((near, jnp.where(earlier, none, other))))
        return dq, *out

    def one(carry, turn):
        """The gradients of these keys so far are on their way while this turn's are computed."""
        keys, dq, so_far = carry
        before, came = send(ring, keys, -1), send(ring, so_far, -1)
        more, *here = part(keys, turn)
        return (before, dq + more, jax.tree.map(jnp.add, came, tuple(here))), None

    last = ring.devices - 1
    before = send(ring, keys, -1)
    dq, *so_far = part(keys, jnp.int32(last))
    carry = before, dq, tuple(so_far)
    if last > 1:
        carry, _ = jax.lax.scan(one, carry, jnp.arange(last - 1, 0, -1, dtype=jnp.int32))
    keys, dq, so_far = carry
    came = send(ring, so_far, -1)
    k, v, others = keys
    more, *here = part_gradients(
        q, k, v, d_o, lse, delta, segments_q=segments, segments_k=others, **options
    )
    dk, dv = jax.tree.map(jnp.add, came, tuple(here))
    d_sinks = sink_gradient(sinks, lse, delta)
    found = narrow(dq + more, q.dtype), narrow(dk, k.dtype), narrow(dv, v.dtype)
    return *home(ring, found), None, None, d_sinks


_attend.defvjp(_forward, _backward)
