"""Attention to blocks of keys that every query chooses for itself: signature and backends."""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.block_sparse import plan, reference, xla
from kernels_pallas.op import Backend, Op


def _mosaic_gpu(*args, **kwargs):
    return generation.kernels(__name__).block_sparse(*args, **kwargs)


def _mosaic_tpu(*args, **kwargs):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.block_sparse import mosaic_tpu

    return mosaic_tpu.block_sparse(*args, **kwargs)


op = Op(
    "block_sparse",
    (
        Backend("xla", xla.block_sparse),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, plan.supports_tpu),
        Backend("reference", reference.block_sparse),
    ),
)


def block_sparse(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, blocks_BxLxGxN, starts_BxM, *, block, scale,
                 return_lse=False, implementation=None):
    """Attend to every key of the chosen blocks: one softmax over the up to N x block of them.

    Heads share choices: query head h follows selection head h // (H / G). Choice m stands for the
    keys [starts[m], starts[m] + block), all of them: causality and segments are the caller's, who
    chooses only among the blocks a query may see. -1, as any number outside [0, M), chooses
    nothing; a block chosen twice counts once. A row without a choice is 0 and its lse -1e30.

    Shapes: q [B, L, H, Dk], k [B, S, K, Dk], v [B, S, K, Dv]; blocks int [B, L, G, N] with H a
        multiple of G and G of K; starts int [B, M]; o [B, L, H, Dv] in v's dtype, and with
        return_lse also the logarithm of the softmax's denominator, [B, L, H] in float32 or wider,
        which has a gradient too. A chosen block lies inside the row and overlaps no other.
    Units: block in tokens.
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: MoBA (2502.13189), algorithm 1; NSA (2502.11089), equation 12.
    """
    q, k, v = q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv
    for name, x in (("q", q), ("k", k), ("v", v), ("blocks", blocks_BxLxGxN)):
        if x.ndim != 4:
            raise ValueError(f"block_sparse: {name} has shape {x.shape}, expected four dims")
    for name, x in (("q", q), ("k", k)):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != v.dtype:
            raise ValueError(f"block_sparse: {name} is {x.dtype} and v is {v.dtype}; "
                             "one float dtype")
    (B, L, H, Dk), (S, K) = q.shape, v.shape[1:3]
    if k.shape != (B, S, K, Dk) or v.shape[0] != B or K == 0:
        raise ValueError(f"block_sparse: shapes do not fit: q {q.shape}, k {k.shape}, "
                         f"v {v.shape}")
    G = blocks_BxLxGxN.shape[2]
    if blocks_BxLxGxN.shape[:2] != (B, L) or starts_BxM.ndim != 2 or starts_BxM.shape[0] != B:
        raise ValueError(f"block_sparse: blocks {blocks_BxLxGxN.shape} and starts "
                         f"{starts_BxM.shape} do not fit q {q.shape}")
    if G == 0 or H % G or G % K:
        raise ValueError(f"block_sparse: {H} heads, {G} selection heads and {K} key heads: "
                         "each must be a multiple of the next")
    for name, x in (("blocks", blocks_BxLxGxN), ("starts", starts_BxM)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"block_sparse: {name} is {x.dtype}, expected integers")
    if not (isinstance(block, numbers.Integral) and block > 0):
        raise ValueError(f"block_sparse: block={block} must be a whole number above 0")
    return op(q, k, v, blocks_BxLxGxN, starts_BxM, block=int(block), scale=scale,
              return_lse=return_lse, implementation=implementation)


explain = op.explain
