"""compress on an NVIDIA GPU in one kernel each way: a thread has a channel's tokens in registers.

Each number is read once forward, and once more backward, where the entry and the logarithm of its
softmax's denominator are kept. A stream is pooled by one block only, its own or the one after it,
so that gradients are written and never added up, but for the bias's, which XLA sums.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import device, hopper
from kernels_pallas.compress.gpu_plan import LANES, lanes

_F32 = jnp.float32
_NOTHING = -1e30  # a logit of a token that is not pooled


def _over_entries(body, out, entries, channels, *arrays):
    """A kernel that calls body(entry, read, write, refs) for some channels of each entry."""
    width = lanes(channels)
    parts = channels // width
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // LANES)

    def program(*refs):
        number = lax.axis_index("program")
        entry = lax.div(number, hopper.i32(parts))
        first = pl.multiple_of((number - entry * parts) * width, width)

        def read(ref, *at):
            return plgpu.load(ref.at[*at, pl.ds(first, width)], layout=layout).astype(_F32)

        def write(ref, *at, value):
            ref.at[*at, pl.ds(first, width)][...] = value.astype(ref.dtype)

        body(entry, read, write, refs)

    # of one dim: of the others CUDA takes no more than 65,535 programs
    kernel = plgpu.kernel(
        program, out_type=out, grid=(entries * parts,), grid_names=("program",),
        interpret=device.target().interpret, compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
    return kernel(*arrays)


def _less(follows):
    """What is added to the logits of a block's tokens for the block after it."""
    return jnp.where(follows != 0, jnp.float32(0), jnp.float32(_NOTHING))


def _forward_kernel(own, bias, follows):
    """Return entries and logarithms of denominators, [B x M, C] in float32 each."""
    T, R, _, S, C = own.shape

    def body(i, read, write, refs):
        follows_gmem, own_gmem, bias_gmem, y_gmem, lse_gmem = refs
        tokens = [(read(own_gmem, i, r, 1, S - 1) + read(bias_gmem, r, S - 1),
                   read(own_gmem, i, r, 0, S - 1)) for r in range(R)]
        if S == 2:
            less, before = _less(follows_gmem[i]), jnp.maximum(i - 1, 0)
            for r in range(R):
                logit = read(own_gmem, before, r, 1, 0) + read(bias_gmem, r, 0) + less
                tokens.append((logit, read(own_gmem, before, r, 0, 0)))
        top = functools.reduce(jnp.maximum, [logit for logit, _ in tokens])
        weights = [jnp.exp(logit - top) for logit, _ in tokens]
        total = sum(weights)
        y = sum(p * value for p, (_, value) in zip(weights, tokens, strict=True))
        write(y_gmem, i, value=y / total)
        write(lse_gmem, i, value=top + jnp.log(total))

    out = [jax.ShapeDtypeStruct((T, C), _F32)] * 2
    return _over_entries(body, out, T, C, follows, own, bias)


def _backward_kernel(own, bias, follows, y, lse, dy):
    """Return the gradient of own. `follows` [B x M + 1], of which the last is 0."""
    T, R, _, S, C = own.shape

    def body(i, read, write, refs):
        follows_gmem, own_gmem, bias_gmem, y_gmem, lse_gmem, dy_gmem, d_gmem = refs

        def of_stream(s, entry, less):
            y, lse, dy = (read(x, entry) for x in (y_gmem, lse_gmem, dy_gmem))
            for r in range(R):
                value = read(own_gmem, i, r, 0, s)
                logit = read(own_gmem, i, r, 1, s) + read(bias_gmem, r, s)
                p = jnp.exp(logit - lse if less is None else logit + less - lse)
                write(d_gmem, i, r, 0, s, value=p * dy)
                write(d_gmem, i, r, 1, s, value=p * dy * (value - y))

        of_stream(S - 1, i, None)
        if S == 2:
            of_stream(0, jnp.minimum(i + 1, hopper.i32(T - 1)), _less(follows_gmem[i + 1]))

    out = jax.ShapeDtypeStruct(own.shape, own.dtype)
    return _over_entries(body, out, T, C, follows, own, bias, y, lse, dy)


def _rows(own, bias, follows):
    """Blocks of all rows end to end; no row's first block follows another."""
    B, M = own.shape[:2]
    follows = follows & (jnp.arange(M) > 0)[None]
    follows = jnp.pad(follows.reshape(-1).astype(jnp.int32), (0, 1))
    return own.reshape(B * M, *own.shape[2:]), bias.astype(_F32), follows


@jax.custom_vjp
def compress(own, bias, follows):
    """Pool in registers."""
    return _forward(own, bias, follows)[0]


def _forward(own, bias, follows):
    y, lse = _forward_kernel(*_rows(own, bias, follows))
    shape = (*own.shape[:2], own.shape[-1])
    return y.reshape(shape).astype(own.dtype), (own, bias, follows, y, lse)


def _backward(kept, dy):
    own, bias, follows, y, lse = kept
    dy = dy.reshape(y.shape).astype(_F32)
    d = _backward_kernel(*_rows(own, bias, follows), y, lse, dy).reshape(own.shape)
    d_bias = d[:, :, :, 1].astype(_F32).sum((0, 1))
    return d, d_bias.astype(bias.dtype), None


compress.defvjp(_forward, _backward)
