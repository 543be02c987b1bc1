"""Cross-entropy of a linear head that never holds the logits: signature and backends."""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from kernels_pallas import generation
from kernels_pallas.cross_entropy import gpu_plan, peers, reference, tiles, xla
from kernels_pallas.op import Backend, Op


def _mosaic_gpu(*arrays, **options):
    return generation.kernels(__name__).cross_entropy(*arrays, **options)


def _mosaic_tpu(*arrays, **options):
    # Pallas takes 0.4 s to import, which only who runs it pays.
    from kernels_pallas.cross_entropy import mosaic_tpu

    return mosaic_tpu.cross_entropy(*arrays, **options)


op = Op(
    "cross_entropy",
    (
        Backend("xla", xla.cross_entropy),
        # Only where they are asked for, until they have run on a chip: PENDING.md.
        Backend("mosaic_gpu", _mosaic_gpu, gpu_plan.supports),
        Backend("mosaic_tpu", _mosaic_tpu, tiles.supports),
        Backend("tokamax", peers.tokamax, peers.tokamax_supports),
        Backend("reference", reference.cross_entropy),
    ),
)


def cross_entropy(x_TxD, head, targets_T, weights_T, *, z_loss=0.0, softcap=None, chunk=None,
                  head_layout="DV", implementation=None):
    """Sum weights * (nll + z_loss * lse^2) over tokens, of the logits x @ head.

    Gradients of x and head flow through the sum alone: the second result is for reporting, and
    targets and weights have no gradient. The products run in x's dtype, the softmax and the
    head's gradient in float32 at least; head's gradient has head's dtype.

    Shapes: x [T, D]; head [D, V] for head_layout 'DV' or [V, D] for 'VD' (a tied embedding, not
        transposed); targets int [T] in [0, V); weights float [T]. Returns the sum, a scalar, and
        nll [T], unweighted and without z_loss.
    Units: nats; chunk in tokens, chosen by the backend when None, for those that go by chunks.
    Errors: ValueError for shapes, dtypes or numbers that do not fit, and for an implementation
        that cannot run.
    Source: chunked as in Liger Kernel (2410.10989); z-loss from PaLM (2204.02311), section 5.
    """
    if head_layout not in ("DV", "VD"):
        raise ValueError(f"cross_entropy: head_layout={head_layout!r} is neither 'DV' nor 'VD'")
    if x_TxD.ndim != 2 or head.ndim != 2:
        raise ValueError(f"cross_entropy: x {x_TxD.shape} and head {head.shape}, expected two dims")
    T, D = x_TxD.shape
    if head.shape[0 if head_layout == "DV" else 1] != D:
        raise ValueError(f"cross_entropy: x {x_TxD.shape} does not fit head {head.shape} of layout "
                         f"{head_layout!r}")
    for name, a in (("targets_T", targets_T), ("weights_T", weights_T)):
        if a.shape != (T,):
            raise ValueError(f"cross_entropy: {name} has shape {a.shape}, expected {(T,)}")
    if not jnp.issubdtype(targets_T.dtype, jnp.integer):
        raise ValueError(f"cross_entropy: targets_T is {targets_T.dtype}, expected integers")
    for name, a in (("x", x_TxD), ("head", head), ("weights_T", weights_T)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"cross_entropy: {name} is {a.dtype}, expected floats")
    if z_loss < 0:
        raise ValueError(f"cross_entropy: z_loss={z_loss} must not be below 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"cross_entropy: softcap={softcap} must be above 0")
    if chunk is not None and not (isinstance(chunk, numbers.Integral) and chunk > 0):
        raise ValueError(f"cross_entropy: chunk={chunk} must be a whole number above 0")
    return op(x_TxD, head, targets_T, weights_T, z_loss=z_loss, softcap=softcap, chunk=chunk,
              head_layout=head_layout, implementation=implementation)


explain = op.explain
