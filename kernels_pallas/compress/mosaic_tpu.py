"""compress on a TPU in one kernel each way: tokens are read once, as they lie in memory.

A program goes through its entries 128 channels at a time. Forward the stream that the block after
pools is summed up with its own block, and the sums move down by a row; those of a program's last
block wait for the next program. Backward, where the entry and the logarithm of its softmax's
denominator are kept, the entry after moves up. A stream is pooled by one block only, so that
gradients are written and never added up, but for the bias's, which XLA sums.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu
from kernels_pallas.compress import tpu_plan
from kernels_pallas.tpu import LANES

_F32 = jnp.float32
_NOTHING = -1e30  # a logit of a token that is not pooled
_ROWS = 8  # of a register: how far shifted rows lie from the edge of what is read in whole ones
_WRITTEN_OUT = 16  # tokens of a block; of more there is a loop


class Plan(NamedTuple):
    """All that is known when tracing: entries T and n of a program, tokens, streams, channels."""

    T: int
    R: int
    S: int
    C: int
    n: int

    @property
    def groups(self) -> int:
        """Groups of channels of a stream."""
        return self.C // LANES

    def over_tokens(self, step, carry):
        """Go through the tokens of a block."""
        if self.R > _WRITTEN_OUT:
            return lax.fori_loop(0, self.R, step, carry)
        for r in range(self.R):
            carry = step(r, carry)
        return carry

    def value(self, stream, group):
        """Where 128 channels' values of a stream are in fast memory; logits are S x groups on."""
        return stream * self.groups + group

    def rows(self, r):
        """The r-th tokens of all blocks."""
        return pl.ds(r, self.n, stride=self.R) if self.R > 1 else pl.ds(r, self.n)


def _lanes(group):
    return pl.ds(pl.multiple_of(group * LANES, LANES), LANES)


def _taken_in(own, tokens):
    for number in range(tokens.shape[0]):
        tokens[number] = own[:, number * LANES:(number + 1) * LANES].astype(_F32)


def _logit(plan, tokens, bias, stream, group):
    """A function of r: the logits [n, 128] of the r-th tokens."""
    at = plan.value(stream, group)
    half = plan.S * plan.groups
    return lambda r: tokens[half + at, plan.rows(r), :] + bias[at, pl.ds(r, 1), :]


def _pooled(plan, tokens, bias, stream, group):
    """Of a block's own tokens: the largest logit, the softmax's denominator, and its numerator."""
    logit = _logit(plan, tokens, bias, stream, group)
    lowest = jnp.full((plan.n, LANES), -jnp.inf, _F32)
    top = plan.over_tokens(lambda r, top: jnp.maximum(top, logit(r)), lowest)

    def add(r, sums):
        weight = jnp.exp(logit(r) - top)
        value = tokens[plan.value(stream, group), plan.rows(r), :]
        return sums[0] + weight, sums[1] + weight * value

    nothing = jnp.zeros((plan.n, LANES), _F32)
    return top, *plan.over_tokens(add, (nothing, nothing))


def _forward_body(plan, own, bias, less, y, lse, tokens, moved):
    _taken_in(own, tokens)

    @pl.when(pl.program_id(0) == 0)
    def _():
        moved[...] = jnp.zeros_like(moved)  # no block comes before

    def group(c, _):
        top, total, acc = _pooled(plan, tokens, bias, plan.S - 1, c)
        if plan.S == 2:
            for number, x in enumerate(_pooled(plan, tokens, bias, 0, c)):
                moved[c, number, pl.ds(_ROWS, plan.n), :] = x
            before = [moved[c, number, pl.ds(_ROWS - 1, plan.n), :] for number in range(3)]
            for number in range(3):
                moved[c, number, pl.ds(_ROWS - 1, 1), :] = (
                    moved[c, number, pl.ds(_ROWS - 1 + plan.n, 1), :])
            before[0] = before[0] + less[...]
            highest = jnp.maximum(top, before[0])
            mine, its = jnp.exp(top - highest), jnp.exp(before[0] - highest)
            total, acc = mine * total + its * before[1], mine * acc + its * before[2]
            top = highest
        y[:, _lanes(c)] = acc / total
        lse[:, _lanes(c)] = top + jnp.log(total)

    lax.fori_loop(0, plan.groups, group, None)


def _backward_body(plan, own, bias, less, *refs):
    kept, after, (d_own, tokens, moved) = refs[:3], refs[3:6], refs[6:]
    _taken_in(own, tokens)
    half = plan.S * plan.groups

    def stream(s, c, y, lse, dy, pooled):
        logit, at = _logit(plan, tokens, bias, s, c), plan.value(s, c)

        def token(r, _):
            d_value = jnp.exp(logit(r) - lse) * dy
            d_logit = d_value * (tokens[at, plan.rows(r), :] - y)
            for place, d in ((at, d_value), (half + at, d_logit)):
                if pooled is not None:
                    d = jnp.where(pooled, d, 0.0)
                tokens[place, plan.rows(r), :] = d

        plan.over_tokens(token, None)

    def group(c, _):
        stream(plan.S - 1, c, *(x[:, _lanes(c)] for x in kept), None)
        if plan.S == 2:
            for number, (x, more) in enumerate(zip(kept, after, strict=True)):
                moved[number, pl.ds(0, plan.n), :] = x[:, _lanes(c)]
                moved[number, pl.ds(plan.n, _ROWS), :] = more[:, _lanes(c)]
            stream(0, c, *(moved[number, pl.ds(1, plan.n), :] for number in range(3)),
                   jnp.broadcast_to(less[...] == 0, (plan.n, LANES)))

    lax.fori_loop(0, plan.groups, group, None)
    for number in range(tokens.shape[0]):
        d_own[:, number * LANES:(number + 1) * LANES] = tokens[number].astype(d_own.dtype)


def _call(plan, body, name, semantics, own, bias, less, kept, out):
    """Call the body for every program; `kept` are arrays [T, C], and `out` shapes."""
    def of_entries(x):
        return pl.BlockSpec((plan.n, x.shape[1]), lambda i: (i, 0))

    tokens = pl.BlockSpec((plan.n * plan.R, own.shape[1]), lambda i: (i, 0))
    last = pl.cdiv(plan.T, _ROWS) - 1
    # of the rows after a program's own the first is read
    after = pl.BlockSpec((_ROWS, plan.C), lambda i: (
        jnp.minimum((i + 1) * (plan.n // _ROWS), last), 0))
    shifted = (plan.groups, 3) if not kept else (3,)
    return tpu.call(
        functools.partial(body, plan), name, out, (semantics,), grid=(pl.cdiv(plan.T, plan.n),),
        in_specs=[tokens, pl.BlockSpec(bias.shape, lambda i: (0, 0, 0)), of_entries(less),
                  *map(of_entries, kept), *[after] * len(kept)],
        out_specs=jax.tree.map(lambda x: tokens if x.shape == own.shape else of_entries(x), out),
        scratch_shapes=[pltpu.VMEM((own.shape[1] // LANES, plan.n * plan.R, LANES), _F32),
                        pltpu.VMEM((*shifted, plan.n + _ROWS, LANES), _F32)],
    )(own, bias, less, *kept, *kept)


def _laid(own, bias, follows):
    """The plan, tokens as rows, the bias by groups of channels [S x C / 128, R, 128], and what is
    added to the logits of the block before [T, 1]; no row's first block follows another."""
    B, M, R, _, S, C = own.shape
    n = tpu_plan.entries(R, S, C, own.dtype.itemsize)
    assert n is not None  # else refused
    follows = follows & (jnp.arange(M) > 0)[None]
    less = jnp.where(follows.reshape(-1, 1), jnp.zeros((), _F32), jnp.full((), _NOTHING, _F32))
    bias = bias.astype(_F32).reshape(R, -1, LANES).swapaxes(0, 1)
    return Plan(B * M, R, S, C, n), own.reshape(B * M * R, 2 * S * C), bias, less


@jax.custom_vjp
def compress(own, bias, follows):
    """Pool in fast memory."""
    return _forward(own, bias, follows)[0]


def _forward(own, bias, follows):
    plan, *arrays = _laid(own, bias, follows)
    entry = jax.ShapeDtypeStruct((plan.T, plan.C), _F32)
    y, lse = _call(plan, _forward_body, "compress", "arbitrary", *arrays, [], [entry, entry])
    return y.reshape(*own.shape[:2], -1).astype(own.dtype), (own, bias, follows, y, lse)


def _backward(kept, dy):
    own, bias, follows, y, lse = kept
    plan, tokens, by_group, less = _laid(own, bias, follows)
    after = jnp.concatenate([less[1:], jnp.full((1, 1), _NOTHING, _F32)])
    d = _call(plan, _backward_body, "compress_gradient", "parallel", tokens, by_group, after,
              [y, lse, dy.reshape(y.shape).astype(_F32)],
              jax.ShapeDtypeStruct(tokens.shape, own.dtype)).reshape(own.shape)
    d_bias = d[:, :, :, 1].astype(_F32).sum((0, 1))
    return d, d_bias.astype(bias.dtype), None


compress.defvjp(_forward, _backward)
