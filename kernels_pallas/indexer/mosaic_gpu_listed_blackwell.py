"""The indexer's divergence over listed keys on Blackwell's tensor cores, forward and backward.

What is computed, and all around the kernels, is Hopper's (mosaic_gpu_listed.py). A step is 64 keys
of each of two queries times the heads of both, of which the two halves that belong together count
and the others are zeros: 512 cycles where 256 are needed, for a width of 128, beside the 1,365 that
loading the keys takes at 24 bytes in a cycle.
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.indexer import blackwell_steps, mosaic_gpu_listed
from kernels_pallas.indexer.gpu_plan import HALF
from kernels_pallas.token_sparse import mosaic_gpu_bwd_blackwell
from kernels_pallas.token_sparse.gpu_plan import Plan


def _score_tiles(plan: Plan, q, w, keys):
    """Return the score of every gathered key [Z x steps x X]."""
    return blackwell_steps.score_steps({"q": q, "w": w}, {"k": keys}, steps=plan.steps)


def _gradient_tiles(plan: Plan, q, weighted, keys, d_score):
    """Return u [Z x 2 x kept, D] and the gradient of every gathered key [Z x steps x X, D]."""
    own = d_score.reshape(-1, 1, 2, HALF) * jnp.eye(2, dtype=d_score.dtype)[None, :, :, None]
    return blackwell_steps.gradient_steps(
        {"q": q, "weighted": weighted}, {"k": keys}, own.reshape(-1), steps=plan.steps, tiles_of=1,
        summed="k", each="weighted", kept=plan.kept, dtype=jnp.bfloat16)


index_kl_listed = mosaic_gpu_listed.comparing(mosaic_gpu_listed.Kernels(
    _score_tiles, _gradient_tiles, mosaic_gpu_bwd_blackwell.add_up))
