"""grouped_matmul on Hopper's tensor cores: bfloat16, accumulated in float32, forward and backward.

Each multiprocessor runs one program of three warpgroups. One fills a ring of shared-memory stages
through the copy engine; two multiply, 64 rows of a tile each, and write the result through the
copy engine while the next tile's stages are already being filled. A tile of the result belongs to
one warpgroup, which adds its products in order: the same bits every time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.grouped_matmul import tiles
from kernels_pallas.grouped_matmul.tiles import COLUMNS, TILE_K, TILE_M, Tiles

_HALF = TILE_M // 2  # rows of one warpgroup


def _persistent(decode, load, multiply, place, plan: Tiles, total, refs):
    """One program's share of the tiles: every `cores`-th.

    `decode(number)` gives a tile, with the number of its `steps` and whether this warpgroup
    `writes` any of its rows; `load(tile, step, slot)` starts the
    copies of a stage, `multiply(tile, step, slot, acc)` issues its products, and
    `place(tile, columns)` names where 64 columns of the warpgroup's result go.
    """
    full, empty, out_smem = refs
    core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
    stages = hopper.i32(plan.stages)
    share = lax.div(total - core + hopper.i32(plan.cores - 1), hopper.i32(plan.cores))  # total >= 0

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def fill(i, done):
            tile = decode(core + i * plan.cores)

            def stage(k, _):
                count = done + k
                slot = lax.rem(count, stages)

                @pl.when(count >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                load(tile, k, slot)

            lax.fori_loop(0, tile.steps, stage, None)
            return done + tile.steps

        lax.fori_loop(0, share, fill, hopper.i32(0))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def produce(i, done):
            tile = decode(core + i * plan.cores)

            def accumulate(acc):
                def stage(k, _):
                    slot = lax.rem(done + k, stages)
                    plgpu.barrier_wait(full.at[slot])
                    multiply(tile, k, slot, acc)
                    # all but the products just issued are done: free the stage before
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done + k - 1, stages)])

                lax.fori_loop(0, tile.steps, stage, None)
                return acc[...]

            result = pl.run_scoped(accumulate, plgpu.ACC((_HALF, plan.n), jnp.float32))

            @pl.when(tile.steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[lax.rem(done + tile.steps - 1, stages)])

            @pl.when(tile.writes)
            def _():
                for part in range(plan.n // COLUMNS):
                    slot = out_smem.at[warpgroup, part % plan.out_slots]
                    plgpu.wait_smem_to_gmem(plan.out_slots - 1, wait_read_only=True)
                    columns = slice(part * COLUMNS, (part + 1) * COLUMNS)
                    slot[...] = result[:, columns].astype(out_smem.dtype)
                    plgpu.commit_smem()
                    place(tile, part * COLUMNS, slot)
                    plgpu.commit_smem_to_gmem_group()

            return done + tile.steps

        lax.fori_loop(0, share, produce, hopper.i32(0))
        plgpu.wait_smem_to_gmem(0)


class _Tile:
    """A decoded tile: scalars of the program."""

    def __init__(self, **scalars):
        self.__dict__.update(scalars)


def _launch(body, plan: Tiles, out, a_stage, b_stage):
    """A kernel of one program per multiprocessor around `body`, with its ring of stages."""
    slots = (2, plan.out_slots, _HALF, COLUMNS)
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=dict(
            a_smem=hopper.shared((plan.stages, *a_stage), jnp.bfloat16),
            b_smem=hopper.shared((plan.stages, *b_stage), jnp.bfloat16),
            out_smem=hopper.shared(slots, out.dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        ),
        grid=(plan.cores,),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=device.target().interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _rows_times(x_RxK, w, layout, *, transposed):
    """x times each expert's w [E, K, N], or the transpose of its w [E, N, K]: [R, N]."""
    R, K = x_RxK.shape
    N = w.shape[1] if transposed else w.shape[2]
    plan = tiles.choose(layout, N, 2, product="transposed" if transposed else "rows",
                        contracted=K)
    items, count = tiles.row_items(layout)
    n_tiles = -(-N // plan.n)
    across = tiles.across(n_tiles)

    def body(items_gmem, count_gmem, x_gmem, w_gmem, y_gmem, *, a_smem, b_smem, out_smem, full,
             empty):
        warpgroup = lax.axis_index("warpgroup")
        used = count_gmem[0]

        def decode(number):
            # column tiles in strips of `across`; in a strip, all of an item's before the next's
            strip = lax.div(number, used * across)
            within = number - strip * used * across
            item = lax.div(within, hopper.i32(across))
            n = (strip * across + within - item * across) * plan.n
            first = pl.multiple_of(items_gmem[item, 1], plan.grain)
            steps = items_gmem[item, 3] * (K // TILE_K)
            rows = items_gmem[item, 2] - warpgroup * _HALF
            return _Tile(expert=items_gmem[item, 0], first=first, steps=steps, rows=rows,
                         writes=rows > 0, n=pl.multiple_of(n, plan.n))

        def load(tile, k, slot):
            contracted = pl.ds(k * TILE_K, TILE_K)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(tile.first, TILE_M), contracted],
                                    a_smem.at[slot], full.at[slot])
            columns = pl.ds(tile.n, plan.n)
            where = (columns, contracted) if transposed else (contracted, columns)
            plgpu.copy_gmem_to_smem(w_gmem.at[tile.expert, *where], b_smem.at[slot], full.at[slot])

        def multiply(tile, k, slot, acc):
            b = b_smem.at[slot]
            plgpu.wgmma(acc, a_smem.at[slot, pl.ds(warpgroup * _HALF, _HALF)],
                        b.transpose((1, 0)) if transposed else b)

        def place(tile, column, smem):
            first = tile.first + warpgroup * _HALF
            columns = pl.ds(tile.n + column, COLUMNS)

            def store(start, length):
                plgpu.copy_smem_to_gmem(smem.at[pl.ds(start, length)],
                                        y_gmem.at[pl.ds(first + start, length), columns],
                                        commit_group=False)

            pl.when(tile.rows >= _HALF)(lambda: store(0, _HALF))
            for start in range(0, _HALF, plan.grain):
                pl.when((tile.rows < _HALF) & (tile.rows > start))(
                    functools.partial(store, start, plan.grain))

        _persistent(decode, load, multiply, place, plan, used * n_tiles, (full, empty, out_smem))

    b_stage = (plan.n, TILE_K) if transposed else (TILE_K, plan.n)
    kernel = _launch(body, plan, jax.ShapeDtypeStruct((R, N), jnp.bfloat16), (TILE_M, TILE_K),
                     b_stage)
    return kernel(items, count, x_RxK, w)


def _weight_gradient(x_RxD, dy_RxF, layout, dtype):
    """The sum over each expert's rows of x^T dy: [E, D, F] in dtype."""
    D, F, E = x_RxD.shape[1], dy_RxF.shape[1], layout.sizes.shape[0]
    plan = tiles.choose(layout, F, jnp.dtype(dtype).itemsize, product="weights", contracted=D)
    groups = tiles.group_items(layout)
    m_tiles, n_tiles = -(-D // TILE_M), -(-F // plan.n)

    def body(groups_gmem, x_gmem, dy_gmem, dw_gmem, *, a_smem, b_smem, out_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * _HALF, _HALF)

        def decode(number):
            item = lax.div(number, hopper.i32(m_tiles * n_tiles))
            within = number - item * (m_tiles * n_tiles)
            m = lax.div(within, hopper.i32(n_tiles))
            first = pl.multiple_of(groups_gmem[item, 1], plan.grain)
            return _Tile(expert=groups_gmem[item, 0], first=first, steps=groups_gmem[item, 2],
                         last=groups_gmem[item, 3], writes=True,
                         m=pl.multiple_of(m * TILE_M, TILE_M),
                         n=pl.multiple_of((within - m * n_tiles) * plan.n, plan.n))

        def load(tile, k, slot):
            rows = pl.ds(tile.first + k * TILE_K, TILE_K)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, pl.ds(tile.m, TILE_M)], a_smem.at[slot],
                                    full.at[slot])
            plgpu.copy_gmem_to_smem(dy_gmem.at[rows, pl.ds(tile.n, plan.n)], b_smem.at[slot],
                                    full.at[slot])

        def clear(tile, k, slot):
            # The next group's rows in the last chunk; each warpgroup clears what it multiplies.
            @pl.when((k == tile.steps - 1) & (tile.last < TILE_K))
            def _():
                piece = a_smem.at[slot, :, mine]
                row = plgpu.broadcasted_iota(jnp.int32, (TILE_K, _HALF), 0,
                                             layout=plgpu.Layout.WGMMA)
                values = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                piece[...] = jnp.where(row < tile.last, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def multiply(tile, k, slot, acc):
            if plan.grain < TILE_K:
                clear(tile, k, slot)
            plgpu.wgmma(acc, a_smem.at[slot, :, mine].transpose((1, 0)), b_smem.at[slot])

        def place(tile, column, smem):
            rows = pl.ds(tile.m + warpgroup * _HALF, _HALF)
            columns = pl.ds(tile.n + column, COLUMNS)
            plgpu.copy_smem_to_gmem(smem, dw_gmem.at[tile.expert, rows, columns],
                                    commit_group=False)

        _persistent(decode, load, multiply, place, plan, hopper.i32(E * m_tiles * n_tiles),
                    (full, empty, out_smem))

    kernel = _launch(body, plan, jax.ShapeDtypeStruct((E, D, F), dtype), (TILE_K, TILE_M),
                     (TILE_K, plan.n))
    return kernel(groups, x_RxD, dy_RxF)


@jax.custom_vjp
def grouped_matmul(x, w, layout):
    """Each row of expert e times w[e], in bfloat16; rows of no group become finite."""
    return _rows_times(x, w.astype(x.dtype), layout, transposed=False)


def _forward(x, w, layout):
    return grouped_matmul(x, w, layout), (x, w, layout)


def _backward(residuals, dy):
    x, w, layout = residuals
    dy = dy.astype(x.dtype)
    dx = _rows_times(dy, w.astype(x.dtype), layout, transposed=True)
    return dx, _weight_gradient(x, dy, layout, w.dtype), None


grouped_matmul.defvjp(_forward, _backward)
