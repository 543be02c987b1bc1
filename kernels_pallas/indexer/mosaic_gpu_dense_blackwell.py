"""The indexer's divergence over all keys on Blackwell's tensor cores, forward and backward.

What is computed, and all around the kernels, is Hopper's (mosaic_gpu_dense.py). Attention's
products of a tile, head by head, lie in tensor memory by turns, and so does the sum of their
exponentials, which one warpgroup adds to: in its registers, where 128 of a thread's held it, 720
bytes of the kernels were spilled. 128 x 128 exponentials at 16 in a cycle are 1,024 cycles, the
products of a head of DeepSeek's latent 2,304. The gradients' sums go 128 keys and two queries a
step.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell, hopper
from kernels_pallas.hopper import X
from kernels_pallas.indexer import blackwell_steps, gpu_plan, mosaic_gpu_dense, xla_dense
from kernels_pallas.indexer.mosaic_gpu_blackwell import PRODUCTS

_F32 = jnp.float32
_LAYOUT = plgpu.Layout.TCGEN05
_COLUMNS = 32  # of a tile that are taken, and written, at once


def _mass_tiles(steps, scale, total, cores, decode, load, less_gmem, mass_gmem, *, a_smem, b_smem,
                out_smem, mass_tmem, ring, sums):
    core = lax.axis_index("core")
    share = lax.div(total - core + hopper.i32(cores - 1), hopper.i32(cores))  # total >= 0

    def over_tiles(call):
        """Add up what call(tile, what went before) says it has done, in stages or heads."""
        lax.fori_loop(0, share, lambda i, done: done + call(decode(core + i * cores), done),
                      hopper.i32(0))

    def fill(tile, done):
        def stage(k, _):
            load(tile, k, ring.acquire(done + k), a_smem, b_smem, ring.full)

        lax.fori_loop(0, tile.steps, stage, None)
        return tile.steps

    def multiply(tile, done):
        def head(h, _):
            place = sums.acquire(done + h)

            def stage(k, _):
                slot = ring.wait((done + h) * steps + k)
                plgpu.tcgen05_mma(place, a_smem.at[slot], b_smem.at[slot].transpose((1, 0)),
                                  accumulate=k > 0)
                plgpu.tcgen05_commit_arrive(ring.empty.at[slot])

            lax.fori_loop(0, steps, stage, None)
            sums.complete(done + h)

        lax.fori_loop(0, tile.heads, head, None)
        return tile.heads

    def write(tile, done):
        def part(tmem, column):
            return plgpu.async_load_tmem(tmem.at[:, pl.ds(column, _COLUMNS)], layout=_LAYOUT)

        def head(h, _):
            less = plgpu.load(less_gmem.at[tile.b, h, pl.ds(tile.t, X)], layout=_LAYOUT.reduce(1))
            place = sums.wait(done + h)
            for column in range(0, X, _COLUMNS):
                raw, before = part(place, column), part(mass_tmem, column)
                before = jnp.where(lax.broadcast_in_dim(h, raw.shape, ()) > 0, before,
                                   jnp.zeros_like(before))
                more = jnp.exp2(raw * scale - hopper.spread(less, raw.shape, 0))
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(mass_tmem.at[:, pl.ds(column, _COLUMNS)], before + more)
            plgpu.commit_tmem()
            sums.release(done + h)

        def place(column, smem):
            columns = pl.ds(tile.s + column, _COLUMNS)
            plgpu.copy_smem_to_gmem(smem, mass_gmem.at[tile.b, pl.ds(tile.t, X), columns],
                                    commit_group=False)

        lax.fori_loop(0, tile.heads, head, None)
        pl.when(tile.writes)(lambda: blackwell.write_tile(
            X, functools.partial(part, mass_tmem), place, out_smem))
        return tile.heads

    def store():
        over_tiles(write)
        plgpu.wait_smem_to_gmem(0)

    blackwell.by_role(lambda: over_tiles(fill), lambda: over_tiles(multiply), store)


def _query_tiles(q, k, slope, *, lanes):
    steps = k.shape[0] // lanes // X
    return blackwell_steps.gradient_steps({"q": q}, {"k": k}, slope, steps=steps,
                                          tiles_of=q.shape[0] // X // lanes, summed="k")[0]


def _key_tiles(k, q, weighted, slope, *, lanes):
    steps = q.shape[0] // lanes // X
    return blackwell_steps.gradient_steps(
        {"k": k}, {"q": q, "weighted": weighted}, slope, steps=steps,
        tiles_of=k.shape[0] // X // lanes, summed="weighted")[0]


_MASS = mosaic_gpu_dense.Mass(
    functools.partial(blackwell.launch, width=X, out_smem=hopper.shared((2, X, _COLUMNS), _F32),
                      mass_tmem=plgpu.TMEM((X, X), _F32)),
    _mass_tiles)
index_kl_dense = xla_dense.comparing(xla_dense.Parts(
    functools.partial(mosaic_gpu_dense.scores, how=PRODUCTS),
    functools.partial(mosaic_gpu_dense.mass, how=_MASS),
    functools.partial(mosaic_gpu_dense.gradients,
                      tiles=mosaic_gpu_dense.Tiles(_query_tiles, X, _key_tiles)),
    gpu_plan.SCORES // 2, lambda q, main_q: 1))
