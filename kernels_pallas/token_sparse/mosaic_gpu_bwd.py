"""Gradients of listed tokens added up by token, on Hopper's tensor cores.

What queries give to tokens is sorted by token; a program owns 128 tokens and multiplies what
belongs to them with a matrix of ones and zeros that it makes of the tokens' numbers. Nothing is
added to memory, every sum has one order, and the same bits come every time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.hopper import HALF, X

_F32, _BF16 = jnp.float32, jnp.bfloat16
_COLUMNS = 32  # of a float32 result, written at once: 128 bytes
_WIDEST = 192  # columns that a warpgroup's registers sum at once


def whole(tokens):
    """Return the rows of a table of sums."""
    return -(-tokens // X) * X


def by_owner(d_PxD, at_P, tokens):
    """Return d and its tokens in the tokens' order, and items [tokens / 128, 2].

    An item is the first 64 rows that belong to 128 tokens, and how many times 64.
    """
    tiles = tokens // X
    order = jnp.argsort(at_P, stable=True)
    at_P = at_P[order]
    d_PxD = d_PxD.at[order].get(mode="promise_in_bounds")
    edges = jnp.searchsorted(at_P, jnp.arange(tiles + 1, dtype=jnp.int32) * X,
                             method="scan_unrolled").astype(jnp.int32)
    first = edges[:-1] // HALF
    chunks = jnp.where(edges[1:] > edges[:-1], -(-edges[1:] // HALF) - first, 0)
    return d_PxD, at_P, jnp.stack([first, chunks], 1)


def add_up(d_PxD, at_P, tokens):
    """Return sums [tokens, D] in float32 of the rows d, where `at` is their token.

    Shapes: P a multiple of 64, tokens of 128, at [P] int32 with `tokens` or more for none.
    """
    D, tiles, slots = d_PxD.shape[1], tokens // X, 6
    width = max(w for w in range(64, _WIDEST + 1, 64) if D % w == 0)
    blocks = D // width  # of columns; an item is a tile's sum of one of them
    d_PxD, at_P, items = by_owner(d_PxD, at_P, tokens)

    def body(items_gmem, at_gmem, d_gmem, out_gmem, *, at_smem, d_smem, out_smem, ones_smem, bar):
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        cores = device.target().cores
        ring = hopper.Ring(*bar, slots)
        share = hopper.share(hopper.i32(tiles * blocks))

        def item(i):
            n = core + i * cores
            first = pl.multiple_of(lax.rem(n, hopper.i32(blocks)) * width, HALF)
            return lax.div(n, hopper.i32(blocks)), pl.ds(first, width)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def fill(i, done):
                tile, columns = item(i)
                first, count = items_gmem[tile, 0], items_gmem[tile, 1]

                def chunk(c, _):
                    slot = ring.acquire(done + c)
                    where = pl.ds((first + c) * HALF, HALF)
                    for source, target in ((at_gmem.at[where], at_smem),
                                           (d_gmem.at[where, columns], d_smem)):
                        plgpu.copy_gmem_to_smem(source, target.at[slot], ring.full.at[slot])

                lax.fori_loop(0, count, chunk, None)
                return done + count

            lax.fori_loop(0, share, fill, hopper.i32(0))

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def multiply(i, done):
                tile, columns = item(i)
                count = items_gmem[tile, 1]
                row = pl.multiple_of(tile * X + warpgroup * HALF, HALF)

                def sum_up(acc):
                    def chunk(c, _):
                        slot = ring.wait(done + c)
                        token = plgpu.load(at_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                        own = plgpu.broadcasted_iota(jnp.int32, (HALF, HALF), 0,
                                                     layout=plgpu.Layout.WGMMA) + row
                        same = own == hopper.spread(token, (HALF, HALF), 1)
                        ones = jnp.where(same, 1.0, 0.0).astype(_BF16)
                        spare = [ones_smem.at[warpgroup]] if hopper.interpreted() else []
                        hopper.weigh(acc, ones, d_smem.at[slot], *spare)
                        plgpu.wgmma_wait(0)
                        ring.release(done + c)

                    lax.fori_loop(0, count, chunk, None)
                    return acc[...]

                total = pl.run_scoped(sum_up, plgpu.ACC((HALF, width), _F32))
                for column in range(0, width, _COLUMNS):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem.at[warpgroup][...] = total[:, column:column + _COLUMNS]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup],
                        out_gmem.at[pl.ds(row, HALF), pl.ds(columns.start + column, _COLUMNS)])
                return done + count

            lax.fori_loop(0, share, multiply, hopper.i32(0))
            plgpu.wait_smem_to_gmem(0)

    scratch = dict(
        at_smem=plgpu.SMEM((slots, HALF), jnp.int32),
        d_smem=hopper.shared((slots, HALF, width), _BF16),
        out_smem=hopper.shared((2, HALF, _COLUMNS), _F32),
        ones_smem=hopper.shared((2, HALF, HALF), _BF16) if hopper.interpreted() else None,
        bar=hopper.barriers(2, slots),
    )
    out = jax.ShapeDtypeStruct((tokens, D), _F32)
    return hopper.launch(body, out, scratch)(items, at_P, d_PxD)
