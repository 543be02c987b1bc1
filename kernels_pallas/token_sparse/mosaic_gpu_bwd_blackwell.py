"""Gradients of listed tokens added up by token, on Blackwell's tensor cores.

As on Hopper (mosaic_gpu_bwd.py), but that sums are in tensor memory: one warpgroup makes the ones
that tell the tokens, one issues the products, and the first writes what they have added up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, device, hopper
from kernels_pallas.hopper import HALF, X
from kernels_pallas.token_sparse import mosaic_gpu_bwd

_F32, _BF16 = jnp.float32, jnp.bfloat16
_LAYOUT = plgpu.Layout.TCGEN05
_COLUMNS = 32  # of a float32 result, written at once: 128 bytes
_WIDEST = 256  # columns of half the tensor memory
_SLOTS, _ONES = 5, 2


def add_up(d_PxD, at_P, tokens):
    """Return sums [tokens, D] in float32 of the rows d, where `at` is their token.

    Shapes: P a multiple of 64, tokens of 128, at [P] int32 with `tokens` or more for none.
    """
    D, tiles = d_PxD.shape[1], tokens // X
    width = max(w for w in range(64, _WIDEST + 1, 64) if D % w == 0)
    blocks = D // width  # of columns; an item is a tile's sum of one of them
    d_PxD, at_P, items = mosaic_gpu_bwd.by_owner(d_PxD, at_P, tokens)

    def body(items_gmem, at_gmem, d_gmem, out_gmem, *, at_smem, d_smem, ones_smem, out_smem, bar,
             ones_bar, tmem, full, free):
        core, cores = lax.axis_index("core"), device.target().cores
        ring, ones = hopper.Ring(*bar, _SLOTS), hopper.Ring(*ones_bar, _ONES)
        sums = blackwell.Sums(tmem, full, free, width)
        share = hopper.share(hopper.i32(tiles * blocks))

        def over_items(call):
            """Call call(i, tile, columns, first chunk, chunks, chunks before) for each item."""
            def item(i, done):
                n = core + i * cores
                tile = lax.div(n, hopper.i32(blocks))
                first = pl.multiple_of(lax.rem(n, hopper.i32(blocks)) * width, HALF)
                count = items_gmem[tile, 1]
                call(i, tile, first, items_gmem[tile, 0], count, done)
                return done + count

            lax.fori_loop(0, share, item, hopper.i32(0))

        def load(i, tile, column, first, count, done):
            def chunk(c, _):
                slot, rows = ring.acquire(done + c), pl.ds((first + c) * HALF, HALF)
                for source, target in ((at_gmem.at[rows], at_smem),
                                       (d_gmem.at[rows, pl.ds(column, width)], d_smem)):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], ring.full.at[slot])

            lax.fori_loop(0, count, chunk, None)

        def multiply(i, tile, column, first, count, done):
            place = sums.acquire(i)

            def chunk(c, _):
                slot, own = ring.wait(done + c), ones.wait(done + c)
                plgpu.tcgen05_mma(place, ones_smem.at[own], d_smem.at[slot], accumulate=c > 0)
                plgpu.tcgen05_commit_arrive(ones.empty.at[own])
                plgpu.tcgen05_commit_arrive(ring.empty.at[slot])

            lax.fori_loop(0, count, chunk, None)
            sums.complete(i)

        def write(i, tile, column, first, count, done):
            row = pl.multiple_of(tile * X, X)

            def chunk(c, _):
                slot, own = ring.wait(done + c), ones.acquire(done + c)
                token = plgpu.load(at_smem.at[slot], layout=_LAYOUT.reduce(0))
                mine = plgpu.broadcasted_iota(jnp.int32, (X, HALF), 0, layout=_LAYOUT) + row
                same = mine == hopper.spread(token, (X, HALF), 1)
                ones_smem.at[own][...] = jnp.where(same, 1.0, 0.0).astype(_BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ones.full.at[own])

            def take(part):
                values = plgpu.async_load_tmem(place.at[:, pl.ds(part, _COLUMNS)], layout=_LAYOUT)
                some = lax.broadcast_in_dim(count, values.shape, ()) > 0
                return jnp.where(some, values, jnp.zeros_like(values))

            def send(part, smem):
                columns = pl.ds(column + part, _COLUMNS)
                plgpu.copy_smem_to_gmem(smem, out_gmem.at[pl.ds(row, X), columns],
                                        commit_group=False)

            lax.fori_loop(0, count, chunk, None)
            place = sums.wait(i)
            blackwell.write_tile(width, take, send, out_smem)
            sums.release(i)

        def store():
            over_items(write)
            plgpu.wait_smem_to_gmem(0)

        blackwell.by_role(lambda: over_items(load), lambda: over_items(multiply), store)

    scratch = dict(
        at_smem=plgpu.SMEM((_SLOTS, HALF), jnp.int32),
        d_smem=hopper.shared((_SLOTS, HALF, width), _BF16),
        ones_smem=hopper.shared((_ONES, X, HALF), _BF16),
        out_smem=hopper.shared((1, X, _COLUMNS), _F32),
        bar=(plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS), blackwell.by_tensor_cores(_SLOTS)),
        ones_bar=(blackwell.by_tensor_cores(_ONES), blackwell.by_tensor_cores(_ONES)),
        **blackwell.places(width),
    )
    out = jax.ShapeDtypeStruct((tokens, D), _F32)
    return hopper.launch(body, out, scratch)(items, at_P, d_PxD)
