"""Copies of experts: which slot serves a pair, and one gradient for all copies of an expert.

A slot holds one copy of one expert. The map from slots to experts, `phy2log`, is data: moving
experts changes numbers in an array and compiles nothing.
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


@jax.custom_vjp
def tie(w_RxDxF: Float[Array, "R D F"], found: Slots) -> Float[Array, "R D F"]:
    """The weights of all slots; each slot's gradient is its expert's, summed over the copies."""
    return w_RxDxF


def _tie_backward(found, dw):
    # gathers only, in the order of copies, so that all copies get the same bits
    def more(copy, total):
        slot = found.slot[:, copy]
        there = slot < dw.shape[0]
        part = dw[jnp.where(there, slot, 0)].astype(jnp.float32)
        return total + jnp.where(there[:, None, None], part, 0)

    first = dw[found.slot[:, 0]].astype(jnp.float32)
    total = jax.lax.fori_loop(1, jnp.max(found.held), more, first)
    return narrow(total, dw.dtype)[found.expert], None


tie.defvjp(lambda w, found: (w, found), _tie_backward)


def square_norm(dw: Float[Array, "*N R D F"], phy2log: Int[Array, "*N R"]) -> Float[Array, ""]:
    """The squared norm of a tied gradient in which every expert counts once."""
    same = phy2log[..., :, None] == phy2log[..., None, :]
    count = jnp.sum(same, axis=-1, dtype=jnp.float32)
    return jnp.sum(jnp.sum(jnp.square(dw), axis=(-2, -1)) / count)
