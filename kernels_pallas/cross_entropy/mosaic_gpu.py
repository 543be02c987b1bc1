"""Cross-entropy of a linear head on a GPU's tensor cores: bfloat16, softmax in float32.

Logits exist a tile at a time, on Hopper, whose kernels are here, in registers; what of their
gradients is written, and why, is said in gpu_plan.py. How a program goes through its tiles is in
`kernels_pallas/products.py`. Blackwell's kernels are in mosaic_gpu_blackwell.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper, products
from kernels_pallas.cross_entropy.gpu_plan import (
    LOG2E,
    NOTHING,
    TILE_K,
    TILE_M,
    Plan,
    capped,
    whole,
)
from kernels_pallas.grouped_matmul import tiles as grouped
from kernels_pallas.hopper import HALF
from kernels_pallas.rounding import narrow

_F32, _BF16 = jnp.float32, jnp.bfloat16
_ROW = plgpu.Layout.WGMMA.reduce(1)


def decode(plan: Plan, number):
    """Return a tile: in strips of tokens, in each of which all of some entries' come first."""
    across = grouped.across(plan.T // TILE_M)
    strip = lax.div(number, hopper.i32(plan.n_tiles * across))
    within = number - strip * (plan.n_tiles * across)
    j = lax.div(within, hopper.i32(across))
    m = (strip * across + within - j * across) * TILE_M
    return products.Tile(m=pl.multiple_of(m, TILE_M), n=pl.multiple_of(j * plan.n, plan.n), j=j,
                         steps=hopper.i32(plan.steps), writes=True)


def _over_logits(plan: Plan, finish, out, out_smem, x, head, *numbers):
    """A kernel that calls finish(tile, logits, entry, rows, numbers, out, out_smem) for each tile.

    `logits` [64, n] are a warpgroup's, bent, NOTHING beyond the vocabulary; `entry` tells which
    they are; `rows` are its tokens, and `numbers` and `out` the arrays in the chip's memory.
    """
    cores, n, stages = device.target().cores, plan.n, plan.stages
    m_tiles, n_tiles = plan.T // TILE_M, plan.n_tiles
    transposed = plan.layout == "VD"

    def body(*refs, a_smem, b_smem, out_smem, full, empty):
        x_gmem, head_gmem, *numbers_gmem, out_gmem = refs
        warpgroup = lax.axis_index("warpgroup")
        ring = hopper.Ring(full, empty, stages)

        def load(tile, k, slot):
            contracted, entries = pl.ds(k * TILE_K, TILE_K), pl.ds(tile.n, n)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(tile.m, TILE_M), contracted], a_smem.at[slot],
                                    full.at[slot])
            where = (entries, contracted) if transposed else (contracted, entries)
            plgpu.copy_gmem_to_smem(head_gmem.at[where], b_smem.at[slot], full.at[slot])

        def multiply(tile, k, slot, acc):
            b = b_smem.at[slot]
            plgpu.wgmma(acc, a_smem.at[slot, pl.ds(warpgroup * HALF, HALF)],
                        b.transpose((1, 0)) if transposed else b)

        def end(tile, product):
            entry = tile.n + plgpu.broadcasted_iota(jnp.int32, product.shape, 1,
                                                    layout=plgpu.Layout.WGMMA)
            logits = capped(plan, product)
            if plan.V % n:
                logits = jnp.where(entry < plan.V, logits, NOTHING)
            rows = pl.ds(tile.m + warpgroup * HALF, HALF)
            finish(tile, logits, entry, rows, numbers_gmem, out_gmem, out_smem)

        products.in_turns(functools.partial(decode, plan), load,
                          lambda tile, done: products.summed(multiply, ring, tile, done, n),
                          end, ring=ring, cores=cores, total=hopper.i32(m_tiles * n_tiles))

    stage = {"a_smem": ((TILE_M, TILE_K), _BF16),
             "b_smem": ((n, TILE_K) if transposed else (TILE_K, n), _BF16)}
    kernel = products.launch(body, out, stages=stages, stage=stage, out_smem=out_smem, cores=cores,
                             approx_math=True)
    return kernel(x, head, *numbers)


def softmax_parts(plan: Plan, x, head, targets):
    """Return of every tile of entries and token the largest logit, the sum of the exponentials less
    it, and the target's logit or 0: [3, tiles, T]."""
    def finish(tile, logits, entry, rows, numbers, parts_gmem, out_smem):
        (targets_gmem,) = numbers
        own = out_smem.at[lax.axis_index("warpgroup")]
        target = hopper.spread(plgpu.load(targets_gmem.at[rows], layout=_ROW), logits.shape, 0)
        chosen = jnp.where(entry == target, logits, jnp.zeros_like(logits)).sum(axis=1)
        top = logits.max(axis=1)
        total = jnp.exp2((logits - hopper.spread(top, logits.shape, 0)) * LOG2E).sum(axis=1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, value in enumerate((top, total, chosen)):
            own.at[i][...] = value
        plgpu.commit_smem()
        for i in range(3):
            plgpu.copy_smem_to_gmem(own.at[i], parts_gmem.at[i, tile.j, rows], commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    out = jax.ShapeDtypeStruct((3, plan.n_tiles, plan.T), _F32)
    return _over_logits(plan, finish, out, plgpu.SMEM((2, 3, HALF), _F32), x, head, targets)


def d_logits(plan: Plan, x, head, targets, row, lse):
    """Return the gradients of the logits [T, columns] in bfloat16."""
    def finish(tile, logits, entry, rows, numbers, d_gmem, out_smem):
        target, row, lse = (plgpu.load(x.at[rows], layout=_ROW) for x in numbers)
        shape = logits.shape
        if plan.z_loss:
            soft_row = row * (1 + (2 * plan.z_loss) * lse)
        else:
            soft_row = row
        soft = jnp.exp2((logits - hopper.spread(lse, shape, 0)) * LOG2E)
        d = soft * hopper.spread(soft_row, shape, 0)
        row = hopper.spread(row, shape, 0)
        d = jnp.where(entry == hopper.spread(target, shape, 0), d - row, d)
        if plan.softcap is not None:
            bent = logits * (1 / plan.softcap)
            d = d * (1 - bent * bent)
        keep = row != 0  # tokens of weight 0 count nothing, whatever they hold
        if plan.V % plan.n:
            keep = keep & (entry < plan.V)
        d = jnp.where(keep, d, jnp.zeros_like(d))

        def place(tile, column, smem):
            columns = pl.ds(tile.n + column, grouped.COLUMNS)
            plgpu.copy_smem_to_gmem(smem, d_gmem.at[rows, columns], commit_group=False)

        products.write_tile(tile, d, place, out_smem)

    out = jax.ShapeDtypeStruct((plan.T, plan.columns), _BF16)
    return _over_logits(plan, finish, out, products.result_memory(_BF16), x, head, targets, row,
                        lse)


# Around the kernels.


class Kernels(NamedTuple):
    """A generation's two kernels."""

    softmax_parts: Callable[..., Any]
    d_logits: Callable[..., Any]


_HOPPER = Kernels(softmax_parts, d_logits)


def _logsumexp(kernels: Kernels, plan: Plan, x, head, targets):
    """Return (lse, nll) [T]."""
    top, total, chosen = kernels.softmax_parts(plan, x, head, targets)
    highest = top.max(0)
    lse = highest + jnp.log((total * jnp.exp(top - highest[None])).sum(0))
    return lse, lse - chosen.sum(0)


def _loss(plan: Plan, weights, nll, lse):
    each = nll + plan.z_loss * lse * lse if plan.z_loss else nll
    return jnp.where(weights == 0, jnp.zeros_like(each), weights * each).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(kernels, plan, x, head, targets, weights):
    return _forward(kernels, plan, x, head, targets, weights)[0]


def _forward(kernels: Kernels, plan: Plan, x, head, targets, weights):
    lse, nll = _logsumexp(kernels, plan, x, narrow(head, _BF16), targets)
    return (_loss(plan, weights, nll, lse), nll), (x, head, targets, weights, lse)


def _backward(kernels: Kernels, plan: Plan, kept, cotangents):
    x, head, targets, weights, lse = kept
    row = weights * cotangents[0].astype(_F32)
    gradients = _by_entries if plan.by_entries else _by_tokens
    return *gradients(kernels, plan, x, head, targets, row, lse), None, None


def _of_tokens(plan: Plan, d, head):
    """What gradients of logits add to the tokens' gradients, in float32."""
    return jnp.einsum("tv,dv->td" if plan.layout == "DV" else "tv,vd->td", d, head,
                      preferred_element_type=_F32)


def _of_head(plan: Plan, d, x, dtype):
    """The head's gradient of these gradients of logits: summed in float32, rounded to dtype."""
    return jnp.einsum("td,tv->dv" if plan.layout == "DV" else "td,tv->vd", x, d,
                      preferred_element_type=dtype)


def _by_tokens(kernels: Kernels, plan: Plan, x, head, targets, row, lse):
    """(dx, dhead) from gradients of logits of some tokens at a time."""
    cast = narrow(head, _BF16)
    C = plan.chunk
    small = dataclasses.replace(plan, T=C)

    def cut(a):
        a = jnp.pad(a, [(0, -len(a) % C)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, C, *a.shape[1:])

    def step(dhead, chunk):
        x, targets, row, lse = chunk
        d = kernels.d_logits(small, x, cast, targets, row, lse)
        return dhead + _of_head(plan, d, x, _F32), _of_tokens(plan, d, cast).astype(_BF16)

    chunks = [cut(a) for a in (x, targets, row, lse)]
    if len(chunks[0]) == 1:
        dhead, dx = step(jnp.zeros((), _F32), [c[0] for c in chunks])
    else:
        dhead, dx = lax.scan(step, jnp.zeros(head.shape, _F32), chunks)
    return dx.reshape(-1, x.shape[1])[:len(x)], dhead.astype(head.dtype)


def _by_entries(kernels: Kernels, plan: Plan, x, head, targets, row, lse):
    """(dx, dhead) from gradients of logits of a part of the vocabulary at a time."""
    axis = 1 if plan.layout == "DV" else 0
    C = plan.chunk
    whole_parts = (plan.V - 1) // C  # the last is shorter, or as long

    def part(small, columns, start, dx, dhead):
        own = lax.dynamic_slice_in_dim(head, start, columns, axis)
        cast = narrow(own, _BF16)
        d = kernels.d_logits(small, x, cast, targets - start, row, lse)
        of_head = _of_head(plan, d, x, head.dtype)
        return (dx + _of_tokens(plan, d, cast),
                lax.dynamic_update_slice_in_dim(dhead, of_head, start, axis))

    dx, dhead = jnp.zeros(x.shape, _F32), jnp.zeros_like(head)
    small = dataclasses.replace(plan, V=C)
    dx, dhead = lax.fori_loop(0, whole_parts, lambda i, sums: part(small, C, i * C, *sums),
                              (dx, dhead))
    start = whole_parts * C
    last = dataclasses.replace(plan, V=plan.V - start)
    dx, dhead = part(last, plan.columns - start, start, dx, dhead)
    return dx.astype(_BF16), dhead


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(x_TxD, head, targets_T, weights_T, *, z_loss=0.0, softcap=None, chunk=None,
                  head_layout="DV", kernels=_HOPPER):
    """Sum the weighted losses tile by tile; the chunk means nothing here."""
    del chunk
    T, D = x_TxD.shape
    plan = Plan(whole(T, TILE_M), whole(D, TILE_K), head.size // D, float(z_loss),
                None if softcap is None else float(softcap), head_layout)
    spare, wide = plan.T - T, plan.D - D
    entries = plan.columns - plan.V
    x = jnp.pad(x_TxD, ((0, spare), (0, wide)))
    head = jnp.pad(head, ((0, wide), (0, entries)) if head_layout == "DV" else
                   ((0, entries), (0, wide)))
    targets = jnp.pad(targets_T.astype(jnp.int32), (0, spare))
    weights = jnp.pad(weights_T.astype(_F32), (0, spare))
    total, nll = _cross_entropy(kernels, plan, x, head, targets, weights)
    return total, nll[:T]
