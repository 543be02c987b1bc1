"""The indexer's divergence over all keys on a TPU's matrix units, forward and backward.

Queries go by chunks, of which scores, attention's mass and the scores' gradients are held for every
key; the softmax over them is XLA's. The mass is summed over heads in fast memory, some heads a
step, so that queries of any number of heads fit; their keys stay meanwhile where heads share them.

The gradients are those of mosaic_tpu_listed.py with all keys for a list. With e[j, t, s] the
gradient of a score where the head's product is above 0, one kernel adds up u[j, t] = sum_s e k[s]
over a tile's keys, and one dk[s] = sum_j,t e w[j, t] q[j, t] over a step's queries; each multiplies
queries and keys again, in one order. What no query of a tile sees is neither loaded nor multiplied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.indexer import mosaic_tpu, tpu_plan, xla_dense
from kernels_pallas.indexer.mosaic_tpu import of_keys, padded, seen
from kernels_pallas.tpu import LANES, whole

_F32 = jnp.float32


def _heads_first(x_BxCxHxD, queries):
    """[B, H, queries, D], filled up with zeros."""
    width = whole(x_BxCxHxD.shape[3], LANES)
    return padded(padded(x_BxCxHxD.swapaxes(1, 2), queries, dim=2), width, dim=3)


def _keys(k_BxSxD, keys):
    return padded(padded(k_BxSxD, keys), whole(k_BxSxD.shape[2], LANES), dim=2)


def _mass_body(plan, tiles, first, q, k, less, mass, acc):
    group = pl.program_id(3)
    row = first[0] + pl.program_id(1) * tiles.t

    @pl.when(seen(plan, tiles, row, pl.program_id(2)))
    def _():
        @pl.when(group == 0)
        def _():
            acc[...] = jnp.zeros_like(acc)

        together = q.shape[0] // k.shape[0]

        def head(j, _):
            keys = k[lax.div(j, jnp.int32(together))]
            raw = tpu.dot(keys, q[j], (1, 1))  # [n, t]: a head's numbers are a row
            acc[...] += jnp.exp(raw * plan.main_scale - less[pl.ds(j, 1), :])

        lax.fori_loop(0, q.shape[0], head, None)

        @pl.when(group == pl.num_programs(3) - 1)
        def _():
            mass[...] = acc[...].T


def _mass(plan, first, q_BxCxHxDk, k_BxKxSxDk, lse_BxCxH):
    """Return attention's weights summed over heads [B, C, S]; any number for what is not seen."""
    (B, C, H, Dk), (K, S) = q_BxCxHxDk.shape, k_BxKxSxDk.shape[1:3]
    tiles = tpu_plan.choose_mass(C, S, H, K, Dk, q_BxCxHxDk.dtype.itemsize)
    queries, keys, D = whole(C, tiles.t), whole(S, tiles.n), whole(Dk, LANES)
    heads, key_heads = tiles.heads, max(tiles.heads * K // H, 1)
    k = padded(padded(k_BxKxSxDk, keys, dim=2), D, dim=3)
    less = padded(lse_BxCxH.swapaxes(1, 2), queries, dim=2).reshape(B, H // heads, heads, queries)
    keys_of = functools.partial(of_keys, plan, tiles)

    def k_map(b, i, s, g, first):
        group = lax.div(g * (heads * K), jnp.int32(H * key_heads))  # `//` asks for the chip's kind
        return b, group, keys_of(first, i, s), 0

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(B, queries // tiles.t, keys // tiles.n, H // heads),
        in_specs=[
            pl.BlockSpec((None, heads, tiles.t, D), lambda b, i, s, g, first: (b, g, i, 0)),
            pl.BlockSpec((None, key_heads, tiles.n, D), k_map),
            pl.BlockSpec((None, None, heads, tiles.t), lambda b, i, s, g, first: (b, g, 0, i))],
        out_specs=pl.BlockSpec((None, tiles.t, tiles.n), lambda b, i, s, g, first: (b, i, s)),
        scratch_shapes=[pltpu.VMEM((tiles.n, tiles.t), _F32)])
    found = tpu.call(
        functools.partial(_mass_body, plan, tiles), "index_mass",
        jax.ShapeDtypeStruct((B, queries, keys), _F32),
        ("parallel", "parallel", "parallel", "arbitrary"), grid_spec=grid,
    )(first, _heads_first(q_BxCxHxDk, queries), k, less)
    return found[:, :C, :S]


def _where_hit(q_head, k, slope):
    """The scores' gradient [t, n] where a head's product counts."""
    raw = tpu.dot(q_head, k[...], (1, 1))
    return jnp.where(raw > 0, slope[...], 0.0).astype(k.dtype)


def _queries_body(plan, tiles, first, q, k, slope, u):
    step = pl.program_id(2)
    row = first[0] + pl.program_id(1) * tiles.t

    @pl.when(step == 0)
    def _():
        u[...] = jnp.zeros_like(u)

    @pl.when(seen(plan, tiles, row, step))
    def _():
        def head(j, _):
            u[j] += tpu.dot(_where_hit(q[j], k, slope), k[...], (1, 0))

        lax.fori_loop(0, q.shape[0], head, None)


def _keys_body(plan, tiles, first, q, weighted, k, slope, dk):
    step, tile = pl.program_id(1), pl.program_id(2)
    row = first[0] + tile * tiles.t

    @pl.when(tile == 0)
    def _():
        dk[...] = jnp.zeros_like(dk)

    @pl.when(seen(plan, tiles, row, step))
    def _():
        def head(j, _):
            dk[...] += tpu.dot(_where_hit(q[j], k, slope), weighted[j], (0, 0))

        lax.fori_loop(0, q.shape[0], head, None)


def _gradients(plan, q_BxCxJxD, k_BxSxD, w_BxCxJ, first, d_score):
    """Return gradients of q, k as [B, D, S], and w, of the scores' times the scale."""
    (B, C, J, D), S = q_BxCxJxD.shape, k_BxSxD.shape[1]
    width, size = whole(D, LANES), q_BxCxJxD.dtype.itemsize
    w = w_BxCxJ.astype(_F32)[..., None]
    weighted = (q_BxCxJxD.astype(_F32) * w).astype(k_BxSxD.dtype)

    def run(name, body, order, result, shape, *by_query):
        """A kernel of which the last loop adds up; `order` names the loops over "tile", "step"."""
        tiles = tpu_plan.choose_slopes(name, C, S, J, D, size)
        queries, keys = whole(C, tiles.t), whole(S, tiles.n)

        def at(place):
            def index(b, x, y, first):
                step, tile = (x, y) if order[0] == "step" else (y, x)
                if order[0] == "step":  # the first tile that sees any key of the step
                    ahead = step * tiles.n * plan.stride + (plan.span - 1) - first[0]
                    least = lax.div(jnp.maximum(ahead, 0), jnp.int32(tiles.t))
                    tile = jnp.minimum(jnp.maximum(tile, least), queries // tiles.t - 1)
                else:
                    step = of_keys(plan, tiles, first, tile, step)
                return b, *(tile if p == "tile" else step if p == "step" else 0 for p in place)

            return index

        held = pl.BlockSpec((None, J, tiles.t, width), at(("", "tile", "")))
        of_k = pl.BlockSpec((None, tiles.n, width), at(("step", "")))
        counts = {"tile": queries // tiles.t, "step": keys // tiles.n}
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(B, *(counts[x] for x in order)),
            in_specs=[*[held] * len(by_query), of_k,
                      pl.BlockSpec((None, tiles.t, tiles.n), at(("tile", "step")))],
            out_specs=held if result == "tile" else of_k)
        slope = padded(padded(d_score, queries), keys, dim=2)
        return tpu.call(
            functools.partial(body, plan, tiles), f"index_{name}",
            jax.ShapeDtypeStruct(shape(queries, keys), _F32),
            ("parallel", "parallel", "arbitrary"), grid_spec=grid,
        )(first, *(_heads_first(x, queries) for x in by_query), _keys(k_BxSxD, keys), slope)

    u = run("query_slopes", _queries_body, ("tile", "step"), "tile",
            lambda queries, keys: (B, J, queries, width), q_BxCxJxD)
    dk = run("key_slopes", _keys_body, ("step", "tile"), "step",
             lambda queries, keys: (B, keys, width), q_BxCxJxD, weighted)
    u = u[:, :, :C, :D].swapaxes(1, 2)
    return u * w, dk[:, :S, :D].swapaxes(1, 2), (q_BxCxJxD.astype(_F32) * u).sum(-1)


def _scores(plan, marks, first, *arrays):
    return mosaic_tpu.scores(plan, marks, first, *arrays), _one(first)


def _one(first):
    return jnp.asarray(first, jnp.int32).reshape(1)


index_kl_dense = xla_dense.comparing(xla_dense.Parts(
    _scores, lambda plan, first, *arrays: _mass(plan, _one(first), *arrays), _gradients,
    tpu_plan.SCORES // 2, lambda q, main_q: 1))
