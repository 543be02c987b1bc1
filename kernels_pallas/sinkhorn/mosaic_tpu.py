"""sinkhorn on a TPU in one kernel each way: a program has 1,024 matrices in its registers.

The backward pass runs forward again and keeps every sum in fast memory; then it goes back: of
m' = m / (s + eps), m is m' (s + eps) and its gradient (d' - sum(d' m')) / (s + eps).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.sinkhorn.tpu_plan import MATRICES, ROWS
from kernels_pallas.tpu import LANES

_F32 = jnp.float32


def _softmax(m_RxRxT):
    """Of every row."""
    powers = jnp.exp(m_RxRxT - m_RxRxT.max(1, keepdims=True))
    return powers * (1 / powers.sum(1, keepdims=True))


def _forward_all(m, iterations, eps, keep=None):
    """The result of logits m; keep(number of the division, sums plus eps)."""
    def divided(m, dim, number):
        total = m.sum(dim, keepdims=True) + eps
        if keep is not None:
            keep(number, total)
        return m * (1 / total)

    def again(n, m):
        return divided(divided(m, 1, 2 * n - 1), 0, 2 * n)

    return lax.fori_loop(1, iterations, again, divided(_softmax(m) + eps, 0, 0))


def _forward_body(iterations, eps, logits, m):
    m[...] = _forward_all(logits[...], iterations, eps)


def _backward_body(iterations, eps, logits, dy, d_logits, sums):
    def keep(number, total):
        sums[number] = total.reshape(sums.shape[1:])

    def undone(m, d, dim, number):
        """What a division began with, and its gradient."""
        total = jnp.expand_dims(sums[number], dim)
        along = (m * d).sum(dim, keepdims=True)
        return m * total, (d - along) * (1 / total)

    def back(c, carry):
        n = iterations - 1 - c
        return undone(*undone(*carry, 0, 2 * n), 1, 2 * n - 1)

    m = _forward_all(logits[...], iterations, eps, keep)
    m, d = lax.fori_loop(0, iterations - 1, back, (m, dy[...]))
    _, d = undone(m, d, 0, 0)
    p = _softmax(logits[...])
    d_logits[...] = p * (d - (p * d).sum(1, keepdims=True))


def _over_matrices(body, name, iterations, eps, *arrays, sums=0):
    """Call the body for every program of [R, R, T / 128, 128]."""
    R, _, rows, _ = arrays[0].shape
    spec = pl.BlockSpec((R, R, ROWS, LANES), lambda i: (0, 0, i, 0))
    scratch = [pltpu.VMEM((sums, R, ROWS, LANES), _F32)] if sums else []
    return tpu.call(functools.partial(body, iterations, eps), name,
                    jax.ShapeDtypeStruct(arrays[0].shape, _F32), ("parallel",),
                    grid=(rows // ROWS,), in_specs=[spec] * len(arrays), out_specs=spec,
                    scratch_shapes=scratch)(*arrays)


def _by_number(x):
    """[..., R, R] as [R, R, T / 128, 128], filled up to whole programs."""
    R = x.shape[-1]
    x = x.reshape(-1, R * R).T
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % MATRICES)))
    return x.reshape(R, R, -1, LANES)


def _by_matrix(x, shape):
    return x.reshape(shape[-1] ** 2, -1)[:, :math.prod(shape[:-2])].T.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sinkhorn(logits, iterations, eps):
    m = _over_matrices(_forward_body, "sinkhorn", iterations, eps, _by_number(logits))
    return _by_matrix(m, logits.shape)


def _backward(iterations, eps, logits, dy):
    d = _over_matrices(_backward_body, "sinkhorn_gradient", iterations, eps, _by_number(logits),
                       _by_number(dy), sums=2 * iterations - 1)
    return (_by_matrix(d, logits.shape),)


_sinkhorn.defvjp(lambda logits, n, eps: (_sinkhorn(logits, n, eps), logits), _backward)


def sinkhorn(logits, *, iterations, eps):
    """Divide by the sums in turns, in registers."""
    return _sinkhorn(logits, iterations, eps)
