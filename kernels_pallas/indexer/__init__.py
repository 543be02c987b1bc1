"""The lightning indexer: which keys every query reads, and how it learns that: signatures.

A score is I[t, s] = scale sum_j w[t, j] relu(q[t, j].k[s]), over J index heads and one key head.
Query t sees key s as in `flash`: query t stands at row t, key s at the last row it covers, ends[s],
or s stride + span - 1 without ends, never after the query and in its segment; segment 0 is padding
and sees nothing. The caller promises that ends[s] is never before s stride + span - 1. Where the
queries are a part of a row, `first` is the row of query 0: a number or a traced int32 scalar.
"""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.indexer import gpu_plan, reference, tpu_plan, xla, xla_dense, xla_listed
from kernels_pallas.op import Backend, Op


def _select_mosaic_gpu(*args, **kwargs):
    return generation.kernels(__name__).index_select(*args, **kwargs)


def _select_mosaic_tpu(*args, **kwargs):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.indexer import mosaic_tpu

    return mosaic_tpu.index_select(*args, **kwargs)


def _dense_mosaic_gpu(*args, **kwargs):
    return generation.kernels(__name__, "mosaic_gpu_dense").index_kl_dense(*args, **kwargs)


def _dense_mosaic_tpu(*args, **kwargs):
    from kernels_pallas.indexer import mosaic_tpu_dense

    return mosaic_tpu_dense.index_kl_dense(*args, **kwargs)


def _listed_mosaic_gpu(*args, **kwargs):
    return generation.kernels(__name__, "mosaic_gpu_listed").index_kl_listed(*args, **kwargs)


def _listed_mosaic_tpu(*args, **kwargs):
    from kernels_pallas.indexer import mosaic_tpu_listed

    return mosaic_tpu_listed.index_kl_listed(*args, **kwargs)


op = Op(
    "index_select",
    (
        Backend("xla", xla.index_select),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _select_mosaic_gpu, gpu_plan.supports_select),
        Backend("mosaic_tpu", _select_mosaic_tpu, tpu_plan.supports_select),
        Backend("reference", reference.index_select),
    ),
)
dense = Op(
    "index_kl_dense",
    (
        Backend("xla", xla_dense.index_kl_dense),
        Backend("mosaic_gpu", _dense_mosaic_gpu, gpu_plan.supports_dense),
        Backend("mosaic_tpu", _dense_mosaic_tpu, tpu_plan.supports_dense),
        Backend("reference", reference.index_kl_dense),
    ),
)
listed = Op(
    "index_kl_listed",
    (
        Backend("xla", xla_listed.index_kl_listed),
        Backend("mosaic_gpu", _listed_mosaic_gpu, gpu_plan.supports_listed),
        Backend("mosaic_tpu", _listed_mosaic_tpu, tpu_plan.supports_listed),
        Backend("reference", reference.index_kl_listed),
    ),
)


def index_select(q_BxLxJxD, k_BxSxD, w_BxLxJ, *, top, segments_q=None, segments_k=None,
                 ends_BxS=None, stride=1, span=1, scale=1.0, first=0, implementation=None):
    """Choose the `top` visible keys of highest score, each once, -1 where fewer are visible.

    Of equal scores the lower key number is taken. Along the last dim the chosen stand in no
    promised order, before the -1. No gradient flows through it.

    Shapes: q [B, L, J, D], k [B, S, D], w [B, L, J], segments int [B, L] and [B, S], ends int
        [B, S] -> int32 [B, L, top].
    Units: stride and span in tokens (rows of the queries).
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: DeepSeek-V3.2 (2512.02556), equations 1 and 2.
    """
    _check("index_select", q_BxLxJxD, k_BxSxD, w_BxLxJ)
    segments_k = _check_keys("index_select", q_BxLxJxD, k_BxSxD, segments_q, segments_k, ends_BxS,
                             stride, span)
    if not (isinstance(top, numbers.Integral) and top > 0):
        raise ValueError(f"index_select: top={top} must be a whole number above 0")
    return op(q_BxLxJxD, k_BxSxD, w_BxLxJ, top=int(top), segments_q=segments_q,
              segments_k=segments_k, ends_BxS=ends_BxS, stride=stride, span=span, scale=scale,
              first=first, implementation=implementation)


def index_kl_dense(q_BxLxJxD, k_BxSxD, w_BxLxJ, main_q_BxLxHxDk, main_k_BxSxKxDk, main_lse_BxLxH,
                   *, main_scale, segments_q=None, segments_k=None, ends_BxS=None, stride=1,
                   span=1, scale=1.0, first=0, implementation=None):
    """Return the divergence of the indexer's softmax from attention's mass over all visible keys.

    loss[t] = KL(p_t || softmax_s I[t, :]), p_t the sum over the H main heads of
    exp(main_scale main_q.main_k - main_lse) divided by its total; 0 where nothing is visible.
    Gradients flow to q, k and w only.

    Shapes: q [B, L, J, D], k [B, S, D], w [B, L, J], main_q [B, L, H, Dk], main_k [B, S, K, Dk]
        with H a multiple of K, main_lse [B, L, H] -> [B, L] in float32, or float64 for float64.
    Units: nats.
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: DeepSeek-V3.2 (2512.02556), equation 3.
    """
    name = "index_kl_dense"
    _check(name, q_BxLxJxD, k_BxSxD, w_BxLxJ)
    segments_k = _check_keys(name, q_BxLxJxD, k_BxSxD, segments_q, segments_k, ends_BxS, stride,
                             span)
    mq, mk, lse = main_q_BxLxHxDk, main_k_BxSxKxDk, main_lse_BxLxH
    rows = (q_BxLxJxD.shape[:2], k_BxSxD.shape[:2])
    fits = mq.ndim == mk.ndim == 4 and (mq.shape[:2], mk.shape[:2]) == rows
    if not (fits and mq.shape[3] == mk.shape[3] and mk.shape[2] and not mq.shape[2] % mk.shape[2]):
        raise ValueError(f"{name}: main_q {mq.shape} and main_k {mk.shape} do not fit "
                         f"q {q_BxLxJxD.shape} and k {k_BxSxD.shape}")
    if lse.shape != mq.shape[:3]:
        raise ValueError(f"{name}: main_lse {lse.shape}, expected {mq.shape[:3]}")
    return dense(q_BxLxJxD, k_BxSxD, w_BxLxJ, mq, mk, lse, main_scale=main_scale,
                 segments_q=segments_q, segments_k=segments_k, ends_BxS=ends_BxS, stride=stride,
                 span=span, scale=scale, first=first, implementation=implementation)


def index_kl_listed(q_BxLxJxD, k_BxSxD, w_BxLxJ, chosen_BxLxN, mass_BxLxN, *, scale=1.0,
                    implementation=None):
    """Return the divergence of the indexer's softmax from the mass, both over the listed keys.

    The target is mass over its sum; -1, as any number outside [0, S), lists nothing, and a query
    that lists nothing has loss 0. A key is listed at most once by a query. Gradients flow to q, k
    and w only.

    Shapes: q [B, L, J, D], k [B, S, D], w [B, L, J], chosen int [B, L, N], mass [B, L, N]
        -> [B, L] in float32, or float64 for float64.
    Units: nats.
    Errors: ValueError for shapes or dtypes that do not fit, and for an implementation that cannot
        run.
    Source: DeepSeek-V3.2 (2512.02556), equation 4.
    """
    name, chosen, mass = "index_kl_listed", chosen_BxLxN, mass_BxLxN
    _check(name, q_BxLxJxD, k_BxSxD, w_BxLxJ)
    if chosen.ndim != 3 or chosen.shape[:2] != q_BxLxJxD.shape[:2] or mass.shape != chosen.shape:
        raise ValueError(f"{name}: chosen {chosen.shape} and mass {mass.shape} do not fit "
                         f"q {q_BxLxJxD.shape}")
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"{name}: chosen is {chosen.dtype}, expected integers")
    return listed(q_BxLxJxD, k_BxSxD, w_BxLxJ, chosen, mass, scale=scale,
                  implementation=implementation)


def _check(name, q, k, w):
    if q.ndim != 4 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[2]:
        raise ValueError(f"{name}: shapes do not fit: q {q.shape}, k {k.shape}")
    if w.shape != q.shape[:3]:
        raise ValueError(f"{name}: w has shape {w.shape}, expected {q.shape[:3]}")
    if not jnp.issubdtype(q.dtype, jnp.floating) or not q.dtype == k.dtype == w.dtype:
        raise ValueError(f"{name}: q is {q.dtype}, k {k.dtype} and w {w.dtype}; one float dtype")


def _check_keys(name, q, k, segments_q, segments_k, ends, stride, span):
    """Return segments_k, which may stand for both."""
    if segments_q is None and segments_k is not None:
        raise ValueError(f"{name}: segments_k is given and segments_q is not")
    segments_k = segments_q if segments_k is None else segments_k
    for label, x, shape in (("segments_q", segments_q, q.shape[:2]),
                            ("segments_k", segments_k, k.shape[:2]), ("ends", ends, k.shape[:2])):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: {label} has shape {x.shape}, expected {shape}")
    for label, x in (("stride", stride), ("span", span)):
        if not (isinstance(x, numbers.Integral) and x > 0):
            raise ValueError(f"{name}: {label}={x} must be a whole number above 0")
    return segments_k


explain = op.explain
