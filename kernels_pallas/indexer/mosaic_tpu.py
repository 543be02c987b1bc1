"""The indexer's scores on a TPU's matrix units, added up in float32.

What no query of a tile sees is neither loaded nor multiplied; why XLA takes the best of the scores
is said in tpu_plan.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.indexer import tpu_plan, xla
from kernels_pallas.indexer.tpu_plan import Tiles
from kernels_pallas.indexer.xla import Marks, Plan
from kernels_pallas.tpu import LANES, whole

_F32 = jnp.float32
_LATER = jnp.iinfo(jnp.int32).max  # where a key ends that nobody may see


def padded(x, length, fill=0, dim=1):
    """Fill up a dim with numbers."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, length - x.shape[dim])
    return jnp.pad(x, widths, constant_values=fill)


def seen(plan: Plan, tiles: Tiles, row, step):
    """Return whether a tile's queries from `row` on see any key of a step."""
    return step * tiles.n * plan.stride + (plan.span - 1) <= row + (tiles.t - 1)


def of_keys(plan: Plan, tiles: Tiles, first, tile, step):
    """Return the keys of a step; those of the tile's last with any where none are to be loaded."""
    last = first[0] + (tile + 1) * tiles.t - 1  # the last query of the tile
    last = lax.div(jnp.maximum(last - (plan.span - 1), 0), jnp.int32(plan.stride * tiles.n))
    return jnp.minimum(step, last)


def _body(plan: Plan, tiles: Tiles, first, q, w, own, k, ends, segments, scores, acc):
    row = first[0] + pl.program_id(1) * tiles.t  # where the tile's first query stands
    some = seen(plan, tiles, row, pl.program_id(2))

    @pl.when(some)
    def _():
        acc[...] = jnp.zeros_like(acc)

        def head(j, _):
            raw = tpu.dot(k[...], q[j], (1, 1))  # [n, t]
            acc[...] += jnp.maximum(raw, 0.0) * w[pl.ds(j, 1), :]

        lax.fori_loop(0, q.shape[0], head, None)
        stands = row + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        may = (ends[...] <= stands) & (segments[...] == own[...])
        scores[...] = jnp.where(may, acc[...].T, -jnp.inf)

    @pl.when(jnp.logical_not(some))
    def _():
        scores[...] = jnp.full_like(scores, -jnp.inf)


def scores(plan: Plan, marks: Marks, first, q_BxCxJxD, k_BxSxD, w_BxCxJ, segments_BxC):
    """Return [B, C, S] float32 scores of the queries from row `first` on, -inf for unseen keys."""
    (B, C, J, D), S = q_BxCxJxD.shape, k_BxSxD.shape[1]
    tiles = tpu_plan.choose(C, S, J, D, q_BxCxJxD.dtype.itemsize)
    queries, keys, width = whole(C, tiles.t), whole(S, tiles.n), whole(D, LANES)

    q = padded(padded(q_BxCxJxD.swapaxes(1, 2), queries, dim=2), width, dim=3)
    w = padded((w_BxCxJ.astype(_F32) * plan.scale).swapaxes(1, 2), queries, dim=2)
    k = padded(padded(k_BxSxD, keys), width, dim=2)
    if marks.ends is None:
        ends = lax.iota(jnp.int32, S) * plan.stride + (plan.span - 1)
        ends = jnp.broadcast_to(ends, (B, S))
    else:
        ends = marks.ends[:, :S].astype(jnp.int32)
    if marks.segments_k is None:
        own, segments = jnp.ones((B, C), jnp.int32), jnp.ones((B, S), jnp.int32)
    else:  # padding is of no segment
        own = segments_BxC.astype(jnp.int32)
        own = jnp.where(own == 0, -1, own)
        segments = marks.segments_k[:, :S].astype(jnp.int32)
    own = padded(own, queries, -1)[..., None]
    ends, segments = (padded(x, keys, fill)[:, None]
                      for x, fill in ((ends, _LATER), (segments, 0)))

    keys_of = functools.partial(of_keys, plan, tiles)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(B, queries // tiles.t, keys // tiles.n),
        in_specs=[
            pl.BlockSpec((None, J, tiles.t, width), lambda b, i, s, first: (b, 0, i, 0)),
            pl.BlockSpec((None, J, tiles.t), lambda b, i, s, first: (b, 0, i)),
            pl.BlockSpec((None, tiles.t, 1), lambda b, i, s, first: (b, i, 0)),
            pl.BlockSpec((None, tiles.n, width),
                         lambda b, i, s, first: (b, keys_of(first, i, s), 0)),
            *[pl.BlockSpec((None, 1, tiles.n),
                           lambda b, i, s, first: (b, 0, keys_of(first, i, s)))] * 2],
        out_specs=pl.BlockSpec((None, tiles.t, tiles.n), lambda b, i, s, first: (b, i, s)),
        scratch_shapes=[pltpu.VMEM((tiles.n, tiles.t), _F32)])
    found = tpu.call(
        functools.partial(_body, plan, tiles), "index_scores",
        jax.ShapeDtypeStruct((B, queries, keys), _F32), ("parallel", "parallel", "arbitrary"),
        grid_spec=grid,
    )(jnp.asarray(first, jnp.int32).reshape(1), q, w, own, k, ends, segments)
    return found[:, :C, :S]


index_select = xla.selecting(scores, tpu_plan.SCORES)
