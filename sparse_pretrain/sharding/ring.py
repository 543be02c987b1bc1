"""Attention over rows that are cut along their length: keys travel round a ring of devices.

Each device keeps its queries. At turn r it has the keys of the r-th device before it, and hands
them on to the next while it attends to them; parts are merged by the logarithms of their softmax's
denominators. The backward pass takes the turns in the opposite order, so that the gradients of
keys come home as they grow. A device holds the keys of two parts of the row at a time, never all.

A part that lies in a query's future is not computed. Parts are runs of a row, so under a causal
mask the last device computes n parts and the first one, which is about twice an even share;
zigzag.py deals chunks out so that all have as much. A window is the same work for all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.flash import flash as _flash
from kernels_pallas.flash.xla import part_gradients
from kernels_pallas.rounding import narrow

UNSEEN = -1e30  # the op's logarithm of nothing
# Bytes of keys and values that a device hands on at a turn: what NVLink sends (450 GB/s) in the
# 10 microseconds that a message takes to start. Below it gathering all at once is as good.
WORTH = 4 << 20
# Parts of a row beyond which a ring holds less than gathered keys do, its own buffers counted.
# Compiled for a CPU, keys of 1 MB and values of 1 MB a part, MB of temporaries by devices:
#   gathered 2: 19, 4: 31, 8: 55 | round a ring 2: 21, 4: 29, 8: 29
# and llama:512x8 for H100s, GB in all: 4 of 8k tokens 0.58 | 0.64, 8 of 32k tokens 1.43 | 1.08
PARTS = 4
# Bytes a step receives for a number of each part that is read, bfloat16 with remat=full: gathered
# twice and its gradient; round a ring three times, and its gradient in float32.
GATHERED_BYTES, RING_BYTES = 6, 10


class Ring(NamedTuple):
    """`turns` of `devices` along a mesh axis, each with `rows` of a row; options of the op."""

    axis: str
    devices: int
    turns: int
    rows: int
    options: tuple[tuple[str, Any], ...]


def turns(devices: int, rows: int, *, causal: bool = True, window: int | None = None) -> int:
    """How many parts of a row its parts read, their own among them."""
    if not causal or window is None:
        return devices
    # the first query of a part sees window - 1 keys before it
    return min(devices, 1 + -(-(window - 1) // rows))


def serves(asked: str, turns: int, devices: int, size: int) -> bool:
    """Whether keys go round, where `asked` is auto, gather or ring.

    Auto has them go round where a window reads so few parts that fewer bytes are sent, and where
    it saves memory: of more than PARTS devices, `size`, the bytes of a device's keys and values,
    being at least WORTH.
    """
    if asked != "auto":
        return asked == "ring"
    fewer = RING_BYTES * (turns - 1) <= GATHERED_BYTES * (devices - 1)
    return fewer or (devices > PARTS and size >= WORTH)


def attend(ring: Ring, q, k, v, segments_q, segments_k, sinks):
    """(o, lse) as of `kernels_pallas.flash`, for this device's part of the rows; in shard_map.

    Shapes: q [B, rows, H, Dk], k [B, rows, K, Dk], v [B, rows, K, Dv]; segments [B, rows] or None,
        sinks [H] or None; o [B, rows, H, Dv], lse [B, rows, H].
    Source: Ring Attention (2310.01889).
    Differs: the backward pass starts from the keys that came last and goes back, which saves the
        gradients' way home; parts that no query reads are not sent.
    """
    return _attend(ring, q, k, v, segments_q, segments_k, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q, k, v, segments, others, sinks):
    return _forward(ring, q, k, v, segments, others, sinks)[0]


def _forward(ring, q, k, v, segments, others, sinks):
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32

    def add(total, keys, turn):
        k, v, others = keys
        o, lse = _flash(
            q, k, v, segments_q=segments, segments_k=others, first=_first(ring, turn),
            return_lse=True, **dict(ring.options),
        )  # fmt: skip
        return merge(total, (o.astype(wide), lse))

    def one(carry, turn):
        keys, total = carry
        ahead = send(ring, keys, 1)
        return (ahead, add(total, keys, turn)), None

    nothing = jnp.zeros((*q.shape[:3], v.shape[-1]), wide), jnp.full(q.shape[:3], UNSEEN, wide)
    carry = (k, v, others), nothing
    last = ring.turns - 1
    if last:
        carry, _ = jax.lax.scan(one, carry, jnp.arange(last, dtype=jnp.int32))
    keys, total = carry
    o, lse = add(total, keys, jnp.int32(last))
    o, lse = with_sinks(o, lse, sinks)
    o = narrow(o, v.dtype)
    return (o, lse), (q, keys, segments, sinks, o, lse)


def _backward(ring, kept, gradients):
    d_o, d_lse = gradients
    # without the barrier XLA sees that the scores were computed before and keeps them alive
    (q, keys, segments, sinks, o, lse), d_o = jax.lax.optimization_barrier((kept, d_o))
    delta = jnp.sum(d_o.astype(lse.dtype) * o.astype(lse.dtype), axis=-1) - d_lse

    def part(keys, turn):
        k, v, others = keys
        return part_gradients(
            q, k, v, d_o, lse, delta, segments_q=segments, segments_k=others,
            first=_first(ring, turn), **dict(ring.options),
        )  # fmt: skip

    def one(carry, turn):
        """The gradients of these keys so far are on their way while this turn's are computed."""
        keys, dq, so_far = carry
        before, came = send(ring, keys, -1), send(ring, so_far, -1)
        more, *here = part(keys, turn)
        return (before, dq + more, jax.tree.map(jnp.add, came, tuple(here))), None

    last = ring.turns - 1
    before = send(ring, keys, -1) if last else keys
    dq, *so_far = part(keys, jnp.int32(last))
    carry = before, dq, tuple(so_far)
    if last > 1:
        carry, _ = jax.lax.scan(one, carry, jnp.arange(last - 1, 0, -1, dtype=jnp.int32))
    if last:
        keys, dq, so_far = carry
        came = send(ring, so_far, -1)
        more, *here = part(keys, jnp.int32(0))
        carry = keys, dq + more, jax.tree.map(jnp.add, came, tuple(here))
    (k, v, _), dq, (dk, dv) = carry
    d_sinks = sink_gradient(sinks, lse, delta)
    return narrow(dq, q.dtype), narrow(dk, k.dtype), narrow(dv, v.dtype), None, None, d_sinks


_attend.defvjp(_forward, _backward)


def _first(ring: Ring, turn):
    """The row of this device's first query, counted from the first key that it has at this turn.

    Below 0, and so nothing is seen, where those keys came round from the end of the rows.
    """
    me = jax.lax.axis_index(ring.axis)
    return (turn - jnp.where(turn > me, ring.devices, 0)) * ring.rows


def send(ring: Ring, tree: Any, step: int) -> Any:
    """The tree of the device `step` places before this one."""
    pairs = [(i, (i + step) % ring.devices) for i in range(ring.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, pairs), tree)


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]):
    """One softmax over the keys of two; each (o, logarithm of the denominator)."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    w_a, w_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = w_a + w_b
    o = (o_a * w_a[..., None] + o_b * w_b[..., None]) / total[..., None]
    return o, jnp.where(top <= UNSEEN, top, top + jnp.log(total))


def with_sinks(o: jax.Array, lse: jax.Array, sinks: jax.Array | None):
    """(o, lse) of a softmax that has the sinks too, [H] or None."""
    if sinks is None:
        return o, lse
    sink = sinks.astype(lse.dtype)[None, None, :]
    return merge((o, lse), (jnp.zeros_like(o), jnp.broadcast_to(sink, lse.shape)))


def sink_gradient(sinks: jax.Array | None, lse: jax.Array, delta: jax.Array):
    """The gradient of the sinks [H], of this device's queries."""
    if sinks is None:
        return None
    weight = jnp.exp(sinks.astype(lse.dtype)[None, None, :] - lse)
    return -jnp.sum(weight * delta, axis=(0, 1)).astype(sinks.dtype)
