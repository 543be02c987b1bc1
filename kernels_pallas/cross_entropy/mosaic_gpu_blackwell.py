"""Cross-entropy of a linear head on Blackwell's tensor cores: bfloat16, softmax in float32.

Logits exist a tile at a time, in tensor memory. The kernels return what Hopper's return, and all
around them is shared (mosaic_gpu.py). A warpgroup takes a tile's logits 64 columns at a time, while
the next tile's products run; forward it keeps a running maximum and sum of each row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, device, hopper
from kernels_pallas.cross_entropy import mosaic_gpu
from kernels_pallas.cross_entropy.gpu_plan import LOG2E, NOTHING, TILE_K, TILE_M, Plan, capped
from kernels_pallas.grouped_matmul.tiles import COLUMNS

_F32, _BF16 = jnp.float32, jnp.bfloat16
_LAYOUT = plgpu.Layout.TCGEN05
_ROW = _LAYOUT.reduce(1)
_SHAPE = (TILE_M, COLUMNS)


def _over_logits(plan: Plan, finish, out, out_smem, x, head, *numbers):
    """A kernel that calls finish(tile, logits, rows, numbers, out, out_smem) for each tile.

    `logits(column)` returns [128, 64] of them, bent, NOTHING beyond the vocabulary, and which
    entries they are; `rows` are the tile's tokens, and `numbers` and `out` the arrays in the chip's
    memory.
    """
    cores, n = device.target().cores, plan.n
    m_tiles, n_tiles = plan.T // TILE_M, plan.n_tiles
    transposed = plan.layout == "VD"

    def body(*refs, a_smem, b_smem, out_smem, ring, sums):
        x_gmem, head_gmem, *numbers_gmem, out_gmem = refs

        def load(tile, k, slot):
            contracted, entries = pl.ds(k * TILE_K, TILE_K), pl.ds(tile.n, n)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(tile.m, TILE_M), contracted], a_smem.at[slot],
                                    ring.full.at[slot])
            where = (entries, contracted) if transposed else (contracted, entries)
            plgpu.copy_gmem_to_smem(head_gmem.at[where], b_smem.at[slot], ring.full.at[slot])

        def multiply(tile, k, slot, place):
            b = b_smem.at[slot]
            plgpu.tcgen05_mma(place, a_smem.at[slot], b.transpose((1, 0)) if transposed else b,
                              accumulate=k > 0)

        def end(tile, place):
            def logits(column):
                found = plgpu.async_load_tmem(place.at[:, pl.ds(column, COLUMNS)], layout=_LAYOUT)
                found = capped(plan, found)
                entry = tile.n + column + plgpu.broadcasted_iota(jnp.int32, _SHAPE, 1,
                                                                 layout=_LAYOUT)
                if plan.V % n:
                    found = jnp.where(entry < plan.V, found, NOTHING)
                return found, entry

            finish(tile, logits, pl.ds(tile.m, TILE_M), numbers_gmem, out_gmem, out_smem)

        blackwell.in_turns(functools.partial(mosaic_gpu.decode, plan), load, multiply, end,
                           ring=ring, sums=sums, cores=cores, total=hopper.i32(m_tiles * n_tiles))

    stage = {"a_smem": ((TILE_M, TILE_K), _BF16),
             "b_smem": ((n, TILE_K) if transposed else (TILE_K, n), _BF16)}
    kernel = blackwell.launch(body, out, stages=plan.stages, stage=stage, width=n,
                              out_smem=out_smem, cores=cores, approx_math=True)
    return kernel(x, head, *numbers)


def softmax_parts(plan: Plan, x, head, targets):
    """Return of every tile of entries and token the largest logit, the sum of the exponentials less
    it, and the target's logit or 0: [3, tiles, T]."""
    def finish(tile, logits, rows, numbers, parts_gmem, out_smem):
        (targets_gmem,) = numbers
        target = hopper.spread(plgpu.load(targets_gmem.at[rows], layout=_ROW), _SHAPE, 0)

        def more(part, old):
            top, total, chosen = old
            found, entry = logits(pl.multiple_of(part * COLUMNS, COLUMNS))
            chosen = chosen + jnp.where(entry == target, found, jnp.zeros_like(found)).sum(axis=1)
            highest = jnp.maximum(top, found.max(axis=1))
            powers = jnp.exp2((found - hopper.spread(highest, _SHAPE, 0)) * LOG2E)
            return highest, total * jnp.exp2((top - highest) * LOG2E) + powers.sum(axis=1), chosen

        # a loop, for which registers hold one part of the logits
        start = [plgpu.layout_cast(jnp.full(TILE_M, x, _F32), _ROW) for x in (NOTHING, 0, 0)]
        top, total, chosen = lax.fori_loop(0, plan.n // COLUMNS, more, tuple(start))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, value in enumerate((top, total, chosen)):
            out_smem.at[i][...] = value
        plgpu.commit_smem()
        for i in range(3):
            plgpu.copy_smem_to_gmem(out_smem.at[i], parts_gmem.at[i, tile.j, rows],
                                    commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    out = jax.ShapeDtypeStruct((3, plan.n_tiles, plan.T), _F32)
    return _over_logits(plan, finish, out, plgpu.SMEM((3, TILE_M), _F32), x, head, targets)


def d_logits(plan: Plan, x, head, targets, row, lse):
    """Return the gradients of the logits [T, columns] in bfloat16."""
    def finish(tile, logits, rows, numbers, d_gmem, out_smem):
        target, row, lse = (plgpu.load(x.at[rows], layout=_ROW) for x in numbers)
        soft_row = row * (1 + (2 * plan.z_loss) * lse) if plan.z_loss else row
        target, row, soft_row, lse = (hopper.spread(x, _SHAPE, 0)
                                      for x in (target, row, soft_row, lse))

        def slope(column):
            found, entry = logits(column)
            d = jnp.exp2((found - lse) * LOG2E) * soft_row
            d = jnp.where(entry == target, d - row, d)
            if plan.softcap is not None:
                bent = found * (1 / plan.softcap)
                d = d * (1 - bent * bent)
            keep = row != 0  # tokens of weight 0 count nothing, whatever they hold
            if plan.V % plan.n:
                keep = keep & (entry < plan.V)
            return jnp.where(keep, d, jnp.zeros_like(d))

        def place(column, smem):
            columns = pl.ds(tile.n + column, COLUMNS)
            plgpu.copy_smem_to_gmem(smem, d_gmem.at[rows, columns], commit_group=False)

        blackwell.write_tile(plan.n, slope, place, out_smem)

    out = jax.ShapeDtypeStruct((plan.T, plan.columns), _BF16)
    return _over_logits(plan, finish, out, hopper.shared((1, *_SHAPE), _BF16), x, head, targets,
                        row, lse)


cross_entropy = functools.partial(
    mosaic_gpu.cross_entropy, kernels=mosaic_gpu.Kernels(softmax_parts, d_logits))
