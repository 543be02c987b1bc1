"""The indexer's divergence over all keys on a GPU's tensor cores, forward and backward.

Queries go by chunks, of which scores, attention's mass and the scores' gradients are held for every
key (gpu_plan.SCORES): written, read and turned about they are about 60 bytes of a pair in both
directions, 18 ps of an H100's memory, where DeepSeek's heads are 147 kFLOP of a pair, twice 150 ps
of its tensor cores. The softmax over them is XLA's.

The mass is summed over heads in registers, 128 queries by 128 keys at a time; what no query of a
tile sees is left unwritten. For 128 heads of one latent of 576 a tile's keys are read anew by every
head: by arithmetic 1365 cycles of reading the second-level cache for 512 of products, which keys
that stay in memory would halve. The gradients are those of mosaic_gpu_listed.py with all keys for a
list: of a query's heads as its rows, 64 of them, and of 64 keys that meet one query after another.
Each adds up in registers and in one order. That is Hopper's; mosaic_gpu_dense_blackwell.py has the
kernels for Blackwell, and what is around them is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper, products
from kernels_pallas.flash.gpu_plan import LOG2E
from kernels_pallas.grouped_matmul.tiles import COLUMNS
from kernels_pallas.hopper import HALF, X
from kernels_pallas.indexer import gpu_plan, mosaic_gpu, xla_dense
from kernels_pallas.indexer.gpu_plan import whole
from kernels_pallas.indexer.mosaic_gpu_listed import raw_products

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW = plgpu.Layout.WGMMA.reduce(1)
_STEP, _STAGES = 64, 4  # of a contracted width; at 64 and two tiles of 128 rows 128 KiB in all


def _laid(x, rows, dim, width):
    """Fill up rows and the last dim with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[dim], widths[-1] = (0, rows - x.shape[dim]), (0, width - x.shape[-1])
    return jnp.pad(x, widths)


class Mass(NamedTuple):
    """How a generation adds up attention's weights over heads.

    Bodies of kernels that `launch` makes get arrays and memory by name, and call `run(heads of a
    tile are `steps` stages each, scale, total, cores, decode, load, less, mass, **memory)`.
    """

    launch: Callable[..., Any]
    run: Callable[..., None]


def _mass_tiles(steps, scale, total, cores, decode, load, less_gmem, mass_gmem, *, a_smem, b_smem,
                out_smem, full, empty):
    """Hopper's: 64 queries of a tile in each of two warpgroups' registers."""
    warpgroup = lax.axis_index("warpgroup")
    ring = hopper.Ring(full, empty, _STAGES)

    def accumulate(tile, done):
        mine = pl.ds(pl.multiple_of(tile.t + warpgroup * HALF, HALF), HALF)

        def head(h, mass):
            less = plgpu.load(less_gmem.at[tile.b, h, mine], layout=_ROW)
            begun = done + h * steps

            def multiply(acc):
                def stage(k, _):
                    slot = ring.wait(begun + k)
                    plgpu.wgmma(acc, a_smem.at[slot, pl.ds(warpgroup * HALF, HALF)],
                                b_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: ring.release(begun + k - 1))

                lax.fori_loop(0, steps, stage, None)
                return acc[...]

            raw = pl.run_scoped(multiply, plgpu.ACC((HALF, X), _F32))
            ring.release(begun + steps - 1)
            return mass + jnp.exp2(raw * scale - hopper.spread(less, (HALF, X), 0))

        nothing = plgpu.layout_cast(jnp.zeros((HALF, X), _F32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, tile.heads, head, nothing)

    def place(tile, column, smem):
        plgpu.copy_smem_to_gmem(
            smem, mass_gmem.at[tile.b, pl.ds(tile.t + warpgroup * HALF, HALF),
                               pl.ds(tile.s + column, COLUMNS)], commit_group=False)

    products.in_turns(
        decode, lambda tile, k, slot: load(tile, k, slot, a_smem, b_smem, full), accumulate,
        lambda tile, mass: products.write_tile(tile, mass, place, out_smem), ring=ring,
        cores=cores, total=total)


_HOPPER = Mass(functools.partial(products.launch, out_smem=products.result_memory(_F32)),
               _mass_tiles)


def mass(plan, first, q_BxCxHxDk, k_BxKxSxDk, lse_BxCxH, *, how: Mass = _HOPPER):
    """Return attention's weights summed over heads [B, C, S]; any number for what is not seen."""
    (B, C, H, Dk), (K, S) = q_BxCxHxDk.shape, k_BxKxSxDk.shape[1:3]
    D, rows, keys = whole(Dk, _STEP), whole(C, X), whole(S, X)
    steps, tiles, blocks, cores = D // _STEP, rows // X, keys // X, device.target().cores
    less = jnp.pad(lse_BxCxH * LOG2E, ((0, 0), (0, rows - C), (0, 0))).swapaxes(1, 2)

    def body(first_gmem, q_gmem, k_gmem, less_gmem, mass_gmem, **memory):
        def decode(number):
            lane = lax.div(number, hopper.i32(tiles * blocks))
            within = number - lane * (tiles * blocks)
            tile = lax.div(within, hopper.i32(blocks))
            t = tile * X
            s = (within - tile * blocks) * X
            # callers promise that no key ends before this
            seen = s * plan.stride + (plan.span - 1) <= first_gmem[0] + t + (X - 1)
            heads = jnp.where(seen, H, 0)
            return products.Tile(b=lane, t=pl.multiple_of(t, X), s=pl.multiple_of(s, X),
                                 heads=heads, steps=heads * steps, writes=seen)

        def load(tile, k, slot, a_smem, b_smem, full):
            head = lax.div(k, hopper.i32(steps))
            part = pl.ds(pl.multiple_of((k - head * steps) * _STEP, _STEP), _STEP)
            plgpu.copy_gmem_to_smem(q_gmem.at[tile.b, pl.ds(tile.t, X), head, part],
                                    a_smem.at[slot], full.at[slot])
            key_head = lax.div(head, hopper.i32(H // K))
            plgpu.copy_gmem_to_smem(k_gmem.at[tile.b, key_head, pl.ds(tile.s, X), part],
                                    b_smem.at[slot], full.at[slot])

        how.run(steps, plan.main_scale * LOG2E, hopper.i32(B * tiles * blocks), cores, decode,
                load, less_gmem, mass_gmem, **memory)

    stage = {"a_smem": ((X, _STEP), _BF16), "b_smem": ((X, _STEP), _BF16)}
    kernel = how.launch(body, jax.ShapeDtypeStruct((B, rows, keys), _F32), stages=_STAGES,
                        stage=stage, cores=cores, approx_math=True)
    found = kernel(jnp.asarray(first, jnp.int32).reshape(1), _laid(q_BxCxHxDk, rows, 1, D),
                   _laid(k_BxKxSxDk, keys, 2, D), less)
    return found[:, :C, :S]


def scores(*arguments, **how):
    """Return the scores, of which gradients need nothing."""
    return mosaic_gpu.scores(*arguments, **how), None


def _where_hit(raw, slope_smem, e_smem):
    """Write the scores' gradient, a number for each of 64 keys, where a head's product counts."""
    slope = hopper.spread(plgpu.load(slope_smem, layout=_ROW), raw.shape, 0)
    e_smem[...] = jnp.where(raw > 0, slope, jnp.zeros_like(slope)).astype(_BF16)
    plgpu.commit_smem()


def _sums(rows, keyed, slope, add, *, lanes):
    """Return for the rows [Z x X, D] what `add(sum, rows, e, *keyed, slope)` adds up step by step.

    `keyed` are [lanes x steps x 64, ...]; slope [Z x steps x X], a tile's own in each step; `e` is
    scratch [64, 64].
    """
    Z, D, steps = rows.shape[0] // X, rows.shape[1], keyed[0].shape[0] // lanes // HALF

    def attend(by_row, keys, emit, memory):
        del emit
        (rows_smem,), (e_smem,) = by_row, memory

        def sum_up(total):
            def step(c, _):
                def part(*held):
                    add(total, rows_smem, e_smem, *held)
                    plgpu.wgmma_wait(0)

                keys(c, part)

            lax.fori_loop(0, steps, step, None)
            return total[...]

        return [pl.run_scoped(sum_up, plgpu.ACC((HALF, D), _F32))]

    lane = lax.iota(jnp.int32, Z) // (Z // lanes)
    return hopper.over_tiles(
        attend, [rows], keyed, [jax.ShapeDtypeStruct(rows.shape, _F32)], steps=steps,
        step_rows=HALF, group=lane, used=jnp.full(1, Z, jnp.int32), scratch=[(HALF, HALF)],
        own=[slope])[0]


def _query_tiles(q, k, slope, *, lanes):
    """Return u [rows of q, D], the sum over keys of a score's gradient times the key.

    Shapes: q [Z x X, D], two queries' 64 heads in each of Z tiles; k [lanes x S, D]; slope
    [Z x S / 64 x X], 64 keys of a tile's first query and of its second.
    """
    def add(u, q_smem, e_smem, k_smem, slope_smem):
        _where_hit(raw_products(q_smem, k_smem), slope_smem, e_smem)
        plgpu.wgmma(u, e_smem.transpose((1, 0)), k_smem)

    return _sums(q, [k], slope, add, lanes=lanes)


def _key_tiles(k, q, weighted, slope, *, lanes):
    """Return the keys' gradients [rows of k, D].

    Shapes: k [Z x X, D]; q and weighted [lanes x queries x 64, D]; slope [Z x queries x X], a
    tile's keys for each query.
    """
    def add(d, k_smem, e_smem, q_smem, weighted_smem, slope_smem):
        _where_hit(raw_products(q_smem, k_smem), slope_smem, e_smem)
        plgpu.wgmma(d, e_smem, weighted_smem)

    return _sums(k, [q, weighted], slope, add, lanes=lanes)


class Tiles(NamedTuple):
    """A generation's sums of gradients: by tile of queries, of so many keys a step, and of keys."""

    queries: Callable[..., Any]
    step: int
    keys: Callable[..., Any]


_HOPPER_TILES = Tiles(_query_tiles, HALF, _key_tiles)


def gradients(plan, q_BxCxJxD, k_BxSxD, w_BxCxJ, made, d_score, *, tiles: Tiles = _HOPPER_TILES):
    """Return gradients of q, k as [B, D, S], and w, of the scores' times the scale."""
    del made
    (B, C, J, D), S = q_BxCxJxD.shape, k_BxSxD.shape[1]
    rows, keys, width = whole(C, 2), whole(S, X), whole(D, 64)
    w = w_BxCxJ.astype(_F32)
    weighted = (q_BxCxJxD.astype(_F32) * w[..., None]).astype(_BF16)

    def by_query(x):
        widths = ((0, 0), (0, rows - C), (0, HALF - J), (0, width - D))
        return jnp.pad(x, widths).reshape(-1, width)

    k = _laid(k_BxSxD, keys, 1, width).reshape(-1, width)
    slope = jnp.pad(d_score, ((0, 0), (0, rows - C), (0, keys - S)))
    pairs = slope.reshape(B, rows // 2, 2, keys // tiles.step, tiles.step)
    pairs = pairs.swapaxes(2, 3).reshape(-1)
    u = tiles.queries(by_query(q_BxCxJxD), k, pairs, lanes=B)
    u = u.reshape(B, rows, HALF, width)[:, :C, :J, :D]
    by_key = slope.reshape(B, rows, keys // X, X).swapaxes(1, 2).reshape(-1)
    dk = tiles.keys(k, by_query(q_BxCxJxD), by_query(weighted), by_key, lanes=B)
    dk = dk.reshape(B, keys, width)[:, :S, :D]
    return u * w[..., None], dk.swapaxes(1, 2), (q_BxCxJxD.astype(_F32) * u).sum(-1)


index_kl_dense = xla_dense.comparing(
    xla_dense.Parts(scores, mass, gradients, gpu_plan.SCORES // 2, lambda q, main_q: 1))
