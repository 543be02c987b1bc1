"""Attention to listed tokens in a latent wider than 128, or of more than 64 heads, on Blackwell.

Rows, lists and the copies are Hopper's (mosaic_gpu_wide.py): a program takes one query and 64 of
its heads at a time. The first of its two multiplying warpgroups issues the products of scores, 64
tokens at once; both read them out of tensor memory and bend them, which costs less than telling the
other (4,096 exponentials are 256 cycles, reading 64 of DeepSeek's tokens about 2,500), and each
multiplies its half of the result's columns, which add up in tensor memory. Forward a warpgroup
shrinks them there by how much larger the largest score has become.

What `turn` is for: barriers and memory that the compiler knows to be the same in every step it
addresses once, before the warpgroups part, and spills where they need all registers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.blackwell import by_tensor_cores
from kernels_pallas.halves import InTensorMemory, taken
from kernels_pallas.token_sparse import mosaic_gpu_wide
from kernels_pallas.token_sparse.gpu_plan import EMPTY, HALF, LOG2E, NOTHING, Plan
from kernels_pallas.token_sparse.mosaic_gpu_wide import SUMMED, kept, over_tiles, send

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SCORES = (HALF, HALF)


@dataclasses.dataclass(frozen=True)
class _Products:
    """So many scores that the warpgroups share, and of each a sum of its own of this width."""

    scores: int
    width: int
    warpgroup: Any = None
    shared: Sequence[Any] = ()
    scored: Any = None
    met: Any = None
    own: Any = None

    def _own(self):
        return InTensorMemory([(HALF, self.width)])

    def scratch(self):
        return ([plgpu.TMEM(_SCORES, _F32) for _ in range(self.scores)], by_tensor_cores(1),
                by_tensor_cores(1, 2), self._own().scratch())

    def of(self, scratch, warpgroup, turn):
        """Return a warpgroup's; `turn` is 0, which the compiler does not know."""
        shared, scored, met, own = scratch
        return dataclasses.replace(
            self, warpgroup=warpgroup, shared=shared, scored=scored.at[turn], met=met.at[turn],
            own=self._own().of(own, warpgroup + turn))

    def meet(self):
        """Wait until both warpgroups have come here."""
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def score(self, *pairs):
        """Return a b^T of each pair, in both warpgroups; they meet before the next ones."""
        @pl.when(self.warpgroup == 0)
        def _():
            for place, (a, b) in zip(self.shared, pairs, strict=True):
                plgpu.tcgen05_mma(place, a, b.transpose((1, 0)), accumulate=False)
            plgpu.tcgen05_commit_arrive(self.scored)

        plgpu.barrier_wait(self.scored)
        return [taken(place) for place in self.shared]

    @property
    def sum(self):
        """The warpgroup's own."""
        return self.own.sums[0]

    def columns(self):
        """Return which columns of the result the warpgroup's sum has."""
        return pl.ds(pl.multiple_of(self.warpgroup * self.width, HALF), self.width)

    def times(self, a, b_smem, more=False):
        """Multiply a with the warpgroup's columns of b, and wait."""
        self.own.multiply(self.sum, a, b_smem.at[:, self.columns()], more)
        self.own.wait()

    def scale(self, by_row):
        """Multiply the rows of the warpgroup's sum."""
        values = taken(self.sum)
        plgpu.async_store_tmem(self.sum, values * hopper.spread(by_row, values.shape, 0))
        plgpu.commit_tmem()


def forward_tiles(plan: Plan, q, kv, bias):
    """Return o [queries x kept, V] and lse [queries x kept]."""
    factor, V = plan.scale * LOG2E, plan.V
    products = _Products(1, V // 2)

    def attend(tile, warpgroup, by_row, keys, outs, numbers, _, own):
        (q_smem,), (o_gmem, lse_gmem), lse_smem = by_row, outs, numbers.at[0]

        def step(c, old):
            def part(memory, kv_smem, bias_smem, own):
                own_q, weights_smem = memory
                (raw,) = own.score((own_q, kv_smem))
                bias = plgpu.load(bias_smem, layout=_COLUMN)
                scores = raw * factor + hopper.spread(bias, _SCORES, 1)
                top = jnp.maximum(old[0], scores.max(axis=1))
                weights = jnp.exp2(scores - hopper.spread(top, _SCORES, 0))
                own.meet()  # both have the scores, and are done with the weights before

                @pl.when(warpgroup == 0)
                def _():
                    weights_smem[...] = weights.astype(_BF16)
                    plgpu.commit_smem()

                own.meet()
                shrink = jnp.exp2(old[0] - top)
                pl.when(c > 0)(lambda: own.scale(shrink))
                own.times(weights_smem, kv_smem, more=c > 0)
                return top, old[1] * shrink + weights.sum(axis=1)

            return keys(c, part)

        empty = [plgpu.layout_cast(jnp.full(HALF, x, _F32), _ROW) for x in (EMPTY, 0)]
        top, total = lax.fori_loop(0, plan.steps, step, tuple(empty))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        share = 1 / total

        @pl.when(warpgroup == 0)
        def _():
            lse_smem[...] = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), NOTHING)
            plgpu.commit_smem()
            count = kept(plan)
            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, count)],
                                    lse_gmem.at[pl.ds(tile * count, count)])

        values = taken(own.sum)
        send(plan, values * hopper.spread(share, values.shape, 0), q_smem, o_gmem, tile,
             own.columns().start)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    rows = plan.tiles * plan.kept
    outs = [jax.ShapeDtypeStruct((rows, V), _BF16), jax.ShapeDtypeStruct((rows,), _F32)]
    return over_tiles(plan, attend, [q], [kv, bias], outs, shared=[_SCORES], numbers=1,
                      products=products)


def _gradient_tiles(plan: Plan, q, do, lse2, delta, kv, bias):
    """Return dq [queries x kept, 512 of D] and, by tile, d_scores above weights [Z x 128, N]."""
    factor, W, V = plan.scale * LOG2E, min(plan.D, SUMMED), plan.V
    products = _Products(2, W // 2)

    def attend(tile, warpgroup, by_row, keys, outs, _, __, own):
        q_smem, _, lse_smem, delta_smem = by_row
        dq_gmem, weights_gmem = outs
        less, delta = (plgpu.load(x, layout=_ROW) for x in (lse_smem, delta_smem))

        def step(c, _):
            def part(memory, kv_smem, bias_smem, own):
                own_q, own_do, *results_smem = memory
                raw, more = own.score((own_q, kv_smem), (own_do, kv_smem.at[:, pl.ds(0, V)]))
                bias = plgpu.load(bias_smem, layout=_COLUMN)
                scores = raw * factor + hopper.spread(bias, _SCORES, 1)
                weights = jnp.exp2(scores - hopper.spread(less, _SCORES, 0)).astype(_BF16)
                more = more - hopper.spread(delta, _SCORES, 0)
                d_scores = (weights.astype(_F32) * more * plan.scale).astype(_BF16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own.meet()  # neither reads what is to be overwritten
                at = pl.ds(pl.multiple_of(c * HALF, HALF), HALF)
                for n, (smem, values) in enumerate(zip(results_smem, (d_scores, weights),
                                                       strict=True)):
                    @pl.when(warpgroup == n)
                    def _(n=n, smem=smem, values=values):
                        smem[...] = values
                        plgpu.commit_smem()
                        rows = pl.ds((tile * 2 + n) * HALF, HALF)
                        plgpu.copy_smem_to_gmem(smem, weights_gmem.at[rows, at])

                own.meet()  # the first has written what both multiply
                own.times(results_smem[0], kv_smem, more=c > 0)

            keys(c, part)

        lax.fori_loop(0, plan.steps, step, None)
        # The queries were read last before the warpgroups met: their memory is free.
        send(plan, taken(own.sum), q_smem, dq_gmem, tile, own.columns().start)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    outs = [jax.ShapeDtypeStruct((plan.tiles * plan.kept, W), _BF16),
            jax.ShapeDtypeStruct((plan.tiles * plan.sets * 2 * HALF, plan.steps * HALF), _BF16)]
    return over_tiles(plan, attend, [q, do, lse2, delta], [kv, bias], outs, shared=[_SCORES] * 2,
                      products=products)


backward_tiles = functools.partial(mosaic_gpu_wide.backward_tiles, gradient=_gradient_tiles)


def mass_tiles(plan: Plan, q, lse2, kv):
    """Return the weight of every gathered token, summed over heads [chunk x steps x 64].

    The warpgroups take every other 64 tokens.
    """
    factor = plan.scale * LOG2E
    products = _Products(0, HALF)

    def attend(tile, warpgroup, by_row, keys, outs, mass_smem, *_):
        (_, lse_smem), (mass_gmem,) = by_row, outs
        less = plgpu.load(lse_smem, layout=_COLUMN)

        def step(c, _):
            def part(rows, kv_smem, own):
                own.own.multiply(own.sum, kv_smem, rows[0].transpose((1, 0)))
                weights = jnp.exp2(own.own.read(own.sum) * factor - hopper.spread(less, _SCORES, 1))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mass_smem.at[warpgroup][...] = weights.sum(axis=1)
                plgpu.commit_smem()
                where = pl.ds((tile * plan.steps + c) * HALF, HALF)
                plgpu.copy_smem_to_gmem(mass_smem.at[warpgroup], mass_gmem.at[where])

            def turn(*memory):
                pl.when((c & 1) == warpgroup)(lambda: part(*memory))

            keys(c, turn)

        lax.fori_loop(0, plan.steps, step, None)

    shape = (plan.tiles, plan.sets, plan.steps, HALF)
    total = plan.tiles * plan.sets * plan.steps * HALF
    (mass,) = over_tiles(plan, attend, [q, lse2], [kv], [jax.ShapeDtypeStruct((total,), _F32)],
                         numbers=2, products=products)
    return mass.reshape(shape).sum(1).reshape(-1)
