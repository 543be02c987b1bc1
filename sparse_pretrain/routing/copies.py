"""Copies of experts: which slot serves a pair, and one gradient for all copies of an expert.

A slot holds one copy of one expert. The map from slots to experts, `phy2log`, is data: moving
experts changes numbers in an array and compiles nothing. A step adds up the copies' gradients once,
before the optimizer sees them; until then each slot has that of its own tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.rounding import narrow


class Slots(NamedTuple):
    """Where every expert's copies are, from `phy2log` alone.

    Shapes: expert [R] of each slot; rank [R], which of its copies a slot is; slot [E, R - E + 1] of
    each copy, R where there is none; held [E], how many copies.
    """

    expert: Int[Array, " R"]
    rank: Int[Array, " R"]
    slot: Int[Array, "E most"]
    held: Int[Array, " E"]


def slots(phy2log_R: Int[Array, " R"], experts: int) -> Slots:
    """The copies of every expert, in the order of their slots."""
    R = phy2log_R.shape[0]
    number = jnp.arange(R, dtype=jnp.int32)
    same = phy2log_R[:, None] == phy2log_R[None, :]
    rank = jnp.sum(same & (number[None, :] < number[:, None]), axis=1, dtype=jnp.int32)
    count = jnp.sum(
        phy2log_R[None, :] == jnp.arange(experts, dtype=phy2log_R.dtype)[:, None],
        axis=1,
        dtype=jnp.int32,
    )
    table = jnp.full((experts, R - experts + 1), R, jnp.int32)
    return Slots(phy2log_R, rank, table.at[phy2log_R, rank].set(number), count)


def choose(expert_TxC: Int[Array, "T C"], found: Slots) -> Int[Array, "T C"]:
    """The slot of every pair: an expert's tokens go round its copies; no expert, no slot.

    Token t of the batch uses copy t modulo the number of copies.
    """
    T, E, R = expert_TxC.shape[0], found.held.shape[0], found.expert.shape[0]
    known = jnp.minimum(expert_TxC, E - 1)
    turn = jnp.arange(T, dtype=jnp.int32)[:, None] % jnp.maximum(found.held[known], 1)
    return jnp.where(expert_TxC < E, found.slot[known, turn], R)


def total(
    dw_RxDxF: Float[Array, "r D F"],
    phy2log_R: Int[Array, " R"],
    experts: int,
    axes: tuple[str, ...] = (),
) -> Float[Array, "r D F"]:
    """Every slot's gradient made its expert's: the sum over the copies, the same bits in each.

    With `axes`, inside a shard_map over them, dw holds this device's run of slots; two sums over
    the devices, of R - E slots each, bring the copies' shares to their expert's first slot and its
    total back.
    """
    found, mine = slots(phy2log_R, experts), _Mine(dw_RxDxF.shape[0], axes)
    more = phy2log_R.shape[0] - experts
    if not more:
        return dw_RxDxF
    extra = jnp.nonzero(found.rank > 0, size=more)[0].astype(jnp.int32)
    copy, first = mine.at(extra), mine.at(found.slot[found.expert[extra], 0])
    shares = mine.everywhere(dw_RxDxF.astype(jnp.float32), copy)

    def add(n, so_far):
        return so_far.at[first[n]].add(shares[n], mode="drop")

    summed = jax.lax.fori_loop(0, more, add, dw_RxDxF.astype(jnp.float32))
    out = summed.at[copy].set(mine.everywhere(summed, first), mode="drop")
    return narrow(out, dw_RxDxF.dtype)


def moved(
    w_RxDxF: Float[Array, "r D F"], source_R: Int[Array, " R"], axes: tuple[str, ...] = ()
) -> Float[Array, "r D F"]:
    """What slot `source[r]` held, for every slot r; with `axes` as in `total`.

    Across devices a slot of each travels at a time, so that none holds more than one of every
    other's.
    """
    if not axes:
        return w_RxDxF[source_R]
    mine, slots_here = _Mine(w_RxDxF.shape[0], axes), w_RxDxF.shape[0]
    wanted = source_R.reshape(-1, slots_here)

    def one(n):
        held = mine.held(w_RxDxF, mine.at(wanted[:, n]))
        return jax.lax.psum_scatter(held, axes, scatter_dimension=0)

    return jax.lax.map(one, jnp.arange(slots_here, dtype=jnp.int32))


class _Mine:
    """The run of `count` slots that this device has, of those dealt over `axes`."""

    def __init__(self, count: int, axes: tuple[str, ...]):
        self.count, self.axes = count, axes
        self.first = jax.lax.axis_index(axes) * count if axes else 0

    def at(self, slot):
        """Where a slot lies here; past the end where it does not."""
        here = slot - self.first
        return jnp.where((here >= 0) & (here < self.count), here, self.count)

    def held(self, w, at):
        """The slots that lie here, zero for others."""
        return w.at[at].get(mode="fill", fill_value=0)

    def everywhere(self, w, at):
        """The slots, wherever they lie; exact, since one device alone adds no zero."""
        held = self.held(w, at)
        return jax.lax.psum(held, self.axes) if self.axes else held


def square_norm(dw: Float[Array, "*N R D F"], phy2log: Int[Array, "*N R"]) -> Float[Array, ""]:
    """The squared norm of a tied gradient in which every expert counts once."""
    same = phy2log[..., :, None] == phy2log[..., None, :]
    count = jnp.sum(same, axis=-1, dtype=jnp.float32)
    return jnp.sum(jnp.sum(jnp.square(dw), axis=(-2, -1)) / count)
