"""sinkhorn on an NVIDIA GPU in one kernel each way: a thread has a matrix in its registers.

The backward pass runs forward again and keeps every sum in shared memory; then it goes back: of
m' = m / (s + eps), m is m' (s + eps) and its gradient (d' - sum(d' m')) / (s + eps).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.sinkhorn.gpu_plan import LANES

_F32 = jnp.float32
_ONE_EACH = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def _over_matrices(body, R, iterations, eps, *arrays, sums=0):
    """A kernel over matrices [R x R, T], T whole programs: body(read, write, sums)."""
    T = arrays[0].shape[1]

    def program(*refs, **scratch):
        mine = pl.ds(pl.multiple_of(lax.axis_index("program") * LANES, LANES), LANES)

        def read(array):
            ref = refs[array]
            return [[plgpu.load(ref.at[i * R + j, mine], layout=_ONE_EACH) for j in range(R)]
                    for i in range(R)]

        def write(m):
            for n, x in enumerate(x for row in m for x in row):
                refs[-1].at[n, mine][...] = x

        body(read, write, scratch.get("sums_smem"))

    scratch = {"sums_smem": plgpu.SMEM((sums, R, LANES), _F32)} if sums else {}
    kernel = plgpu.kernel(
        program, out_type=jax.ShapeDtypeStruct((R * R, T), _F32), scratch_types=scratch,
        grid=(T // LANES,), grid_names=("program",), interpret=device.target().interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
    return kernel(*arrays)


def _turned(m):
    return [list(column) for column in zip(*m, strict=True)]


def _softmax(m):
    """Of every row."""
    found = []
    for row in m:
        top = functools.reduce(jnp.maximum, row)
        powers = [jnp.exp(x - top) for x in row]
        total = sum(powers)
        found.append([p / total for p in powers])
    return found


def _divided(m, eps, keep=None):
    """Rows over their sums plus eps; keep(i, sum) is called with each."""
    found = []
    for i, row in enumerate(m):
        total = sum(row) + eps
        if keep is not None:
            keep(i, total)
        found.append([x / total for x in row])
    return found


def _undone(m, d, total):
    """What `_divided` began with, and its gradient; total(i) are the sums plus eps."""
    before, gradient = [], []
    for i, (row, slope) in enumerate(zip(m, d, strict=True)):
        s = total(i)
        along = sum(x * g for x, g in zip(row, slope, strict=True))
        before.append([x * s for x in row])
        gradient.append([(g - along) / s for g in slope])
    return before, gradient


def _forward_all(m, iterations, eps, keep=None):
    """The result of logits m; keep(number of the division, row, sum)."""
    def by(number):
        return None if keep is None else functools.partial(keep, number)

    m = [[x + eps for x in row] for row in _softmax(m)]
    m = _turned(_divided(_turned(m), eps, by(hopper.i32(0))))

    def again(n, m):
        m = _divided(m, eps, by(2 * n - 1))
        return _turned(_divided(_turned(m), eps, by(2 * n)))

    return lax.fori_loop(1, iterations, again, m)


def _run(R, iterations, eps, logits):
    def body(read, write, _):
        write(_forward_all(read(0), iterations, eps))

    return _over_matrices(body, R, iterations, eps, logits)


def _run_backward(R, iterations, eps, logits, dy):
    def body(read, write, sums_smem):
        def keep(number, i, total):
            sums_smem.at[number, i][...] = total

        def sums(number):
            return lambda i: plgpu.load(sums_smem.at[number, i], layout=_ONE_EACH)

        def back(c, carry):
            m, d = carry
            n = iterations - 1 - c
            m, d = _undone(_turned(m), _turned(d), sums(2 * n))
            return _undone(_turned(m), _turned(d), sums(2 * n - 1))

        m = _forward_all(read(0), iterations, eps, keep)
        m, d = lax.fori_loop(0, iterations - 1, back, (m, read(1)))
        _, d = _undone(_turned(m), _turned(d), sums(hopper.i32(0)))
        found = []
        for p, slope in zip(_softmax(read(0)), _turned(d), strict=True):
            along = sum(x * g for x, g in zip(p, slope, strict=True))
            found.append([x * (g - along) for x, g in zip(p, slope, strict=True)])
        write(found)

    return _over_matrices(body, R, iterations, eps, logits, dy, sums=2 * iterations - 1)


def _by_number(x):
    """[..., R, R] as [R x R, T], filled up to whole programs."""
    x = x.reshape(-1, x.shape[-1] ** 2).T
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))


def _by_matrix(x, shape):
    return x[:, :math.prod(shape[:-2])].T.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sinkhorn(logits, iterations, eps):
    return _by_matrix(_run(logits.shape[-1], iterations, eps, _by_number(logits)), logits.shape)


def _backward(iterations, eps, logits, dy):
    dx = _run_backward(logits.shape[-1], iterations, eps, _by_number(logits), _by_number(dy))
    return (_by_matrix(dx, logits.shape),)


_sinkhorn.defvjp(lambda logits, n, eps: (_sinkhorn(logits, n, eps), logits), _backward)


def sinkhorn(logits, *, iterations, eps):
    """Divide by the sums in turns, in registers."""
    return _sinkhorn(logits, iterations, eps)
