"""Experts on many devices: rows travel to their expert's device and back, inside `shard_map`.

Axis names come as arguments; no mesh is read. `everywhere` takes what a plan says. Three ways,
equal to one device in values and gradients, and none drops a pair, whatever the load:

gathered   every device sees every token and computes its own experts' share; for small meshes.
exchanged  each (token, expert) pair goes to its expert's device, in rounds of `chunk` rows per
           pair of devices: `padded` sends whole chunks, `ragged` only the rows that are there.
by_node    each token goes once to every node that holds one of its experts, and from there to the
           devices: with routing limited to M nodes, at most M copies cross between nodes.

Call them with `check_vma=False`: the kernels' loops start from arrays that all devices share.
Rounds bound the memory at chunk x devices rows; any load only takes more of them. The backward
pass sends the rows again in place of keeping them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.rounding import narrow
from sparse_pretrain.routing import experts
from sparse_pretrain.sharding import ops


class Wire(NamedTuple):
    """How rows travel: over `axis`, `chunk` rows per pair of devices and round.

    `agree` are all axes whose devices must take the same number of rounds.
    """

    axis: str
    chunk: int
    ragged: bool
    agree: tuple[str, ...]


def everywhere(
    weights: experts.Weights,
    x_BxLxD: Float[Array, "B L D"],
    expert_TxC: Int[Array, "T C"],
    weight_TxC: Float[Array, "T C"],
) -> Float[Array, "B L D"]:
    """`experts.run` wherever the plan has put tokens, experts and their hidden width.

    Tokens travel by `exchanged`, as `ops.exchange` says; a hidden width in parts adds up.
    """

    def local(weights, x, expert, weight, axes):
        args = weights, x.reshape(-1, x.shape[-1]), *(a.reshape(-1, C) for a in (expert, weight))
        if axes.get("E"):
            (axis,) = axes["E"]
            y = exchanged(*args, axis=axis, ragged=ragged)
        else:
            y = experts.run(*args)
        if axes.get("F"):
            y = narrow(jax.lax.psum(y.astype(jnp.float32), axes["F"]), x.dtype)
        return y.reshape(x.shape)

    ragged = ops.exchange() == "ragged"
    (B, L, _), C = x_BxLxD.shape, expert_TxC.shape[1]
    seats = (a.reshape(B, L, C) for a in (expert_TxC, weight_TxC))
    dims = (("E.F", "E.F", "EF."), "BL.", "BL.", "BL.")
    return ops.each_device(local, (weights, x_BxLxD, *seats), dims, "BL.")


def gathered(
    weights: experts.Weights,
    x_TxD: Float[Array, "T D"],
    expert_TxC: Int[Array, "T C"],
    weight_TxC: Float[Array, "T C"],
    *,
    axis: str,
) -> Float[Array, "T D"]:
    """`experts.run` over the experts of all devices of `axis`, by gathering the tokens.

    Shapes: weights lead with this device's slots; expert numbers count over all devices, and one
    past the last is none.
    """
    local = weights.gate.shape[0]
    everyone = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
    mine = everyone(expert_TxC) - jax.lax.axis_index(axis) * local
    mine = jnp.where((mine >= 0) & (mine < local), mine, local)
    part = experts.run(weights, everyone(x_TxD), mine, everyone(weight_TxC))
    total = jax.lax.psum_scatter(part.astype(jnp.float32), axis, tiled=True)
    return narrow(total, x_TxD.dtype)


def exchanged(
    weights: experts.Weights,
    x_TxD: Float[Array, "T D"],
    expert_TxC: Int[Array, "T C"],
    weight_TxC: Float[Array, "T C"],
    *,
    axis: str,
    chunk: int = 0,
    ragged: bool = False,
    agree: tuple[str, ...] = (),
) -> Float[Array, "T D"]:
    """`experts.run` over the experts of all devices of `axis`, each pair sent to its expert.

    Shapes as in `gathered`. Units: `chunk` rows per pair of devices and round, 0 for a quarter
    above the even share. `ragged` needs a platform with `ragged_all_to_all`; CPU has none.
    """
    local, devices = weights.gate.shape[0], jax.lax.axis_size(axis)
    wire = Wire(axis, chunk or _even(expert_TxC.size, devices), ragged, agree or (axis,))
    inside = (expert_TxC % local)[:, :, None]
    peer = jnp.minimum(expert_TxC // local, devices)
    return _ship(_run, wire, local, weights, x_TxD, peer, inside, weight_TxC[:, :, None])


def by_node(
    weights: experts.Weights,
    x_TxD: Float[Array, "T D"],
    expert_TxC: Int[Array, "T C"],
    weight_TxC: Float[Array, "T C"],
    *,
    node_axis: str,
    axis: str,
    chunk: int = 0,
    node_chunk: int = 0,
    ragged: bool = False,
) -> Float[Array, "T D"]:
    """`exchanged` over nodes x devices, each token crossing once to every node that it needs.

    Shapes as in `gathered`; devices count node by node. Units: `node_chunk` and `chunk` rows per
    round between nodes and within one, 0 for defaults.
    Source: DeepSeek-V3's dispatch, 2412.19437 section 3.2.2.
    """
    nodes, devices = jax.lax.axis_size(node_axis), jax.lax.axis_size(axis)
    on_node = weights.gate.shape[0] * devices
    node_TxC = expert_TxC // on_node
    here = node_TxC[:, None, :] == jnp.arange(nodes, dtype=node_TxC.dtype)[None, :, None]
    peer = jnp.where(here.any(2), jnp.arange(nodes, dtype=node_TxC.dtype)[None, :], nodes)
    inside = jnp.where(here, (expert_TxC % on_node)[:, None, :], on_node)
    weight = jnp.where(here, weight_TxC[:, None, :], 0)
    T, C = expert_TxC.shape
    node_wire = Wire(
        node_axis, node_chunk or _even(T * min(C, nodes), nodes), ragged, (node_axis, axis)
    )
    inner = _Within(axis, chunk, ragged, (node_axis, axis))
    return _ship(inner, node_wire, on_node, weights, x_TxD, peer, inside, weight)


class _Within(NamedTuple):
    """`exchanged` with its options, hashable as a custom gradient's static argument must be."""

    axis: str
    chunk: int
    ragged: bool
    agree: tuple[str, ...]

    def __call__(self, weights, x, expert, weight):
        return exchanged(weights, x, expert, weight, **self._asdict())


def _run(weights, x, expert, weight):
    return experts.run(weights, x, expert, weight)


def _even(pairs: int, peers: int) -> int:
    """A quarter above the even share, in whole blocks of 8."""
    return max(8, -(-pairs * 5 // (peers * 4 * 8)) * 8)


class _Order(NamedTuple):
    """Copies sorted by peer. Shapes: order [P]; rank, peer [N, M]; held, first [W]; rounds []."""

    order: Array
    rank: Array
    peer: Array
    held: Array
    first: Array
    rounds: Array


def _order(peer_NxM, wire: Wire) -> _Order:
    W, P = jax.lax.axis_size(wire.axis), peer_NxM.size
    flat = peer_NxM.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    edges = jnp.searchsorted(flat[order], jnp.arange(W + 1, dtype=jnp.int32)).astype(jnp.int32)
    count, first = edges[1:] - edges[:-1], edges[:-1]
    place = (
        jnp.zeros((P,), jnp.int32)
        .at[order]
        .set(jnp.arange(P, dtype=jnp.int32), unique_indices=True)
    )
    rank = place - edges[jnp.minimum(flat, W)]
    rounds = jnp.max((count + (wire.chunk - 1)) // wire.chunk)
    for axis in wire.agree:
        rounds = jax.lax.pmax(rounds, axis)
    return _Order(order, rank.reshape(peer_NxM.shape), peer_NxM, count, first, rounds)


class _Round:
    """One round: which copies go where, and the two directions of travel."""

    def __init__(self, o: _Order, i, wire: Wire):
        self.o, self.wire = o, wire
        W, C = o.held.shape[0], wire.chunk
        self.start = i * C
        self.sent = jnp.clip(o.held - self.start, 0, C)
        lane = jnp.arange(C, dtype=jnp.int32)[None, :]
        self.used = lane < self.sent[:, None]
        at = jnp.where(self.used, o.first[:, None] + self.start + lane, 0)
        self.copy = o.order[at].reshape(W * C)
        self.token = self.copy // o.peer.shape[1]
        self.used = self.used.reshape(W * C)
        inside = (o.rank >= self.start) & (o.rank < self.start + C) & (o.peer < W)
        self.inside = inside
        self.row = jnp.where(inside, o.peer * C + o.rank - self.start, 0)

    def pick(self, a_NxMxK, empty):
        """The payload of every copy sent, `empty` in rows without one."""
        rows = a_NxMxK.reshape(-1, a_NxMxK.shape[-1])[self.copy]
        return jnp.where(self.used[:, None], rows, jnp.asarray(empty, rows.dtype))

    def tokens(self, x_NxD):
        """The token of every copy sent, zero in rows without one."""
        return jnp.where(self.used[:, None], x_NxD[self.token], jnp.zeros((), x_NxD.dtype))

    def travel(self, rows):
        """Rows [W * chunk, ...] to the peers they are grouped by; what the peers sent comes in."""
        if not self.wire.ragged:
            return jax.lax.all_to_all(rows, self.wire.axis, 0, 0, tiled=True)
        return self._ragged(rows, self.sent, self._received())

    def back(self, rows):
        """The answers, to where their rows came from."""
        if not self.wire.ragged:
            return jax.lax.all_to_all(rows, self.wire.axis, 0, 0, tiled=True)
        return self._ragged(rows, self._received(), self.sent)

    def _received(self):
        return jax.lax.all_to_all(self.sent, self.wire.axis, 0, 0, tiled=True)

    def _ragged(self, rows, sent, received):
        chunk, W = self.wire.chunk, sent.shape[0]
        mine = jnp.arange(W, dtype=jnp.int32) * chunk
        there = jnp.full((W,), jax.lax.axis_index(self.wire.axis) * chunk, jnp.int32)
        return jax.lax.ragged_all_to_all(
            rows, jnp.zeros_like(rows), mine, sent, there, received, axis_name=self.wire.axis
        )

    def home(self, rows):
        """Per token and copy the row that came back [N, K] for each of M, zero for others."""
        for m in range(self.row.shape[1]):
            yield jnp.where(self.inside[:, m, None], rows[self.row[:, m]], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ship(
    inner: Callable, wire: Wire, none: int, weights, x_NxD, peer_NxM, expert_NxMxK, weight_NxMxK
):
    """y[n] = sum over copies m of inner(weights of peer[n, m], x[n], expert[n, m], weight[n, m]).

    Peer W, one past the last, is nowhere; `none` is the expert number of an empty seat.
    """
    return _ship_forward(inner, wire, none, weights, x_NxD, peer_NxM, expert_NxMxK, weight_NxMxK)[0]


def _ship_forward(inner, wire, none, weights, x, peer, expert, weight):
    o = _order(peer, wire)

    def one(i, y):
        r = _Round(o, i, wire)
        payload = r.tokens(x), r.pick(expert, none), r.pick(weight, 0)
        answer = r.back(inner(weights, *(r.travel(a) for a in payload)))
        for part in r.home(answer):
            y = y + part.astype(jnp.float32)
        return y

    y = jax.lax.fori_loop(0, o.rounds, one, jnp.zeros(x.shape, jnp.float32))
    return narrow(y, x.dtype), (weights, x, o, expert, weight)


def _ship_backward(inner, wire, none, residuals, dy):
    weights, x, o, expert, weight = residuals
    dy = dy.astype(x.dtype)

    def one(i, total):
        d_weights, dx, d_weight = total
        r = _Round(o, i, wire)
        there = r.travel(r.pick(expert, none))

        def run(weights, rows, share):
            return inner(weights, rows, there, share)

        _, pull = jax.vjp(run, weights, r.travel(r.tokens(x)), r.travel(r.pick(weight, 0)))
        more, d_rows, d_share = pull(r.travel(r.tokens(dy)))
        d_weights = jax.tree.map(lambda a, b: a + b.astype(a.dtype), d_weights, more)
        for part in r.home(r.back(d_rows)):
            dx = dx + part.astype(jnp.float32)
        share = jnp.stack(list(r.home(r.back(d_share))), axis=1)
        return d_weights, dx, d_weight + share.astype(jnp.float32)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (weights, x, weight))
    d_weights, dx, d_weight = jax.lax.fori_loop(0, o.rounds, one, zeros)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return d_weights, narrow(dx, x.dtype), None, None, d_weight.astype(weight.dtype)


_ship.defvjp(_ship_forward, _ship_backward)
