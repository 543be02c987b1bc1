"""The gradient of the keys of block_sparse on Hopper's tensor cores.

A program owns the gradient of some keys of one block and adds the tiles of that block up in their
order, in registers: nothing is added to memory, and the same bits come every time. Where a chunk
has few blocks, a block's tiles are cut in parts of fixed number, whose sums are added afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.block_sparse.plan import HALF, LOG2E, Plan, X

_F32, _BF16 = jnp.float32, jnp.bfloat16
_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each column of a product's result
_COLUMNS = 32  # of a float32 result, written at once: 128 bytes


def items_of(plan: Plan, found, halves):
    """Return what one program sums at once, [parts x E x subs, 4] int32.

    `halves` are how many sums it makes of the same keys. Columns: the first tile and how many, the
    first key by block, and the first row of the result.
    """
    E, subs = plan.groups, plan.block // plan.owned
    used = jnp.arange(found.group.shape[0], dtype=jnp.int32) < found.used
    group = jnp.where(used, found.group, E)
    edges = jnp.searchsorted(group, jnp.arange(E + 1, dtype=jnp.int32), method="scan_unrolled")
    edges = edges.astype(jnp.int32)
    size = -(-(edges[1:] - edges[:-1]) // plan.parts)
    part = jnp.arange(plan.parts, dtype=jnp.int32)[:, None]
    begin = jnp.minimum(edges[None, :-1] + part * size[None], edges[None, 1:])
    end = jnp.minimum(begin + size[None], edges[None, 1:])
    key = jnp.arange(E * subs, dtype=jnp.int32).reshape(1, E, subs) * plan.owned
    rows = halves * part[:, :, None] * (E * plan.block) + key
    columns = (begin[:, :, None], (end - begin)[:, :, None], key, rows)
    return jnp.stack(jnp.broadcast_arrays(*columns), -1).reshape(-1, 4)


def key_gradients(plan: Plan, found, q, do, lse2, delta, k, v):
    """Return (dk / scale [E, block, Dk], dv [E, block, Dv]) of the tiles of a chunk, float32.

    `q`, `do`, `lse2` and `delta` are by slot, zeros and 1e30 where there is no pair; `k` and
    `v` by block, [E x block, D].
    """
    items, factor = items_of(plan, found, plan.halves), plan.scale * LOG2E
    widths = (plan.Dk, plan.Dv)
    per_slot = 2 * X * sum(widths)
    kept = 2 * plan.owned * sum(widths)
    interpreted = hopper.interpreted()
    staging = 2 * 4 * HALF * _COLUMNS + (2 * 2 * HALF * HALF * 2 if interpreted else 0)
    left = hopper.SHARED - hopper.BARRIERS - staging
    slots = min((left - kept) // (per_slot + 8 * X), 4)
    key_slots = 2 if left - slots * (per_slot + 8 * X) >= 2 * kept else 1

    def body(items_gmem, q_gmem, do_gmem, lse_gmem, delta_gmem, k_gmem, v_gmem, dk_gmem, dv_gmem,
             *, k_smem, v_smem, rows_smem, out_smem, weights_smem, keys_bar, rows_bar):
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        cores = device.target().cores
        by_key = hopper.Ring(*keys_bar, key_slots)
        by_row = hopper.Ring(*rows_bar, slots)
        share = hopper.share(hopper.i32(items.shape[0]))

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def fill(i, done):
                item = core + i * cores
                slot = by_key.acquire(i)
                where = pl.ds(pl.multiple_of(items_gmem[item, 2], HALF), plan.owned)
                for source, target in ((k_gmem, k_smem), (v_gmem, v_smem)):
                    plgpu.copy_gmem_to_smem(source.at[where], target.at[slot],
                                            by_key.full.at[slot])
                first, count = items_gmem[item, 0], items_gmem[item, 1]

                def tile(t, _):
                    slot = by_row.acquire(done + t)
                    where = pl.ds((first + t) * X, X)
                    for source, target in zip((q_gmem, do_gmem, lse_gmem, delta_gmem), rows_smem,
                                              strict=True):
                        plgpu.copy_gmem_to_smem(source.at[where], target.at[slot],
                                                by_row.full.at[slot])

                lax.fori_loop(0, count, tile, None)
                return done + count

            lax.fori_loop(0, share, fill, hopper.i32(0))

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            # The warpgroups take different keys of all rows, or different rows of the same keys.
            own_keys = pl.ds(warpgroup * HALF, HALF) if plan.wide else pl.ds(0, HALF)
            shape = (HALF, HALF)

            def multiply(i, done):
                item = core + i * cores
                key_slot = by_key.wait(i)
                k, v = k_smem.at[key_slot, own_keys], v_smem.at[key_slot, own_keys]
                count = items_gmem[item, 1]
                spare = [weights_smem.at[warpgroup, n] for n in range(2) if interpreted]

                def sum_up(dk, dv):
                    def half(slot, own):
                        q, do, lse, delta = (x.at[slot, own] for x in rows_smem)

                        # One after the other, and weights kept in bfloat16: beside two results
                        # of width 128 registers have room for no more.
                        def product(a, b):
                            def of(acc):
                                plgpu.wgmma(acc, a, b.transpose((1, 0)))
                                return acc[...]

                            return pl.run_scoped(of, plgpu.ACC(shape, _F32))

                        raw, less = product(k, q), plgpu.load(lse, layout=_COLUMN)
                        weights = jnp.exp2(raw * factor - hopper.spread(less, shape, 1))
                        weights = weights.astype(_BF16)
                        hopper.weigh(dv, weights, do, *spare[:1])
                        d_weights, less = product(v, do), plgpu.load(delta, layout=_COLUMN)
                        d_weights -= hopper.spread(less, shape, 1)
                        d_scores = (weights.astype(_F32) * d_weights).astype(_BF16)
                        hopper.weigh(dk, d_scores, q, *spare[1:])

                    def tile(t, _):
                        slot = by_row.wait(done + t)
                        if plan.wide:
                            half(slot, pl.ds(0, HALF))
                            half(slot, pl.ds(HALF, HALF))
                        else:
                            half(slot, pl.ds(warpgroup * HALF, HALF))
                        plgpu.wgmma_wait(0)
                        by_row.release(done + t)

                    lax.fori_loop(0, count, tile, None)
                    return dk[...], dv[...]

                results = pl.run_scoped(sum_up, *(plgpu.ACC((HALF, D), _F32) for D in widths))
                by_key.release(i)
                # read only now: while products are summed, no register is left for it
                row = items_gmem[item, 3]
                row += warpgroup * (HALF if plan.wide else plan.groups * plan.block)
                row = pl.multiple_of(row, HALF)
                for value, target in zip(results, (dk_gmem, dv_gmem), strict=True):
                    for column in range(0, value.shape[1], _COLUMNS):
                        columns = slice(column, column + _COLUMNS)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_smem.at[warpgroup][...] = value[:, columns]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            out_smem.at[warpgroup],
                            target.at[pl.ds(row, HALF), pl.ds(column, _COLUMNS)])
                return done + count

            lax.fori_loop(0, share, multiply, hopper.i32(0))
            plgpu.wait_smem_to_gmem(0)

    parts = plan.parts * plan.halves
    outs = [jax.ShapeDtypeStruct((parts * plan.groups * plan.block, D), _F32) for D in widths]
    scratch = dict(
        k_smem=hopper.shared((key_slots, plan.owned, plan.Dk), _BF16),
        v_smem=hopper.shared((key_slots, plan.owned, plan.Dv), _BF16),
        rows_smem=[*(hopper.shared((slots, X, D), _BF16) for D in widths),
                   *(plgpu.SMEM((slots, X), _F32) for _ in range(2))],
        out_smem=hopper.shared((2, HALF, _COLUMNS), _F32),
        weights_smem=hopper.shared((2, 2, HALF, HALF), _BF16) if interpreted else None,
        keys_bar=hopper.barriers(2, key_slots),
        rows_bar=hopper.barriers(4, slots),
    )
    sums = hopper.launch(body, outs, scratch)(items, q, do, lse2, delta, k, v)
    return [x.reshape(parts, plan.groups, plan.block, -1).sum(0) for x in sums]
