"""GPipe's pipeline of layers: stages along `pipe`, micro-batches through them in one program.

For forward passes alone, and for training where `pipeline=gpipe`; scheduled.py has the schedules
that take the gradient as they go.

Every device of a stage holds its layers. At each tick a stage runs the micro-batch that it has and
hands it on (`ppermute`); M micro-batches are through S stages after M + S - 1 ticks. The gradient
runs the same ticks backwards. A stage keeps what came in, for each micro-batch, and computes the
rest again: one more forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas import device
from sparse_pretrain.sharding import apply, scheduled
from sparse_pretrain.sharding.scheduled import AXIS


def through(
    placed: apply.Placed, layer: Callable[..., Any], arrays: Any, carry: Any, rows: Any
) -> tuple[Any, Any]:
    """All layers, `layer(carry, arrays of one layer, rows) -> (carry, told)`, over a batch's rows.

    What a layer adds to its carry and tells are sums over a batch or means over one; of both this
    returns the sum over micro-batches.

    Shapes: `arrays` lead with the layers; carry (x [B, L, D], scalars); leaves of `rows` [B, L].
    """
    x, sums = carry
    M, S = placed.microbatches, placed.stages
    inner = placed.inside(AXIS)
    deal = functools.partial(scheduled.deal, inner, M)
    # XLA:CPU aborts on a sum of bfloat16 over devices where other axes are left to it
    wide = jnp.float32 if device.platform() == "cpu" and x.dtype == jnp.bfloat16 else x.dtype

    def stages(arrays, x_MxBxLxD, rows_M):
        with inner.naming():
            y, *told = _ticks(layer, M, S, arrays, x_MxBxLxD.astype(x.dtype), rows_M, sums)
            return jax.lax.psum(y.astype(wide), AXIS), *told

    every, own = PartitionSpec(), PartitionSpec(AXIS)
    y, more, told = jax.shard_map(
        stages,
        in_specs=(own, every, every),
        out_specs=(every, every, own),
        axis_names={AXIS},
        check_vma=False,
    )(arrays, deal(x.astype(wide)), jax.tree.map(deal, rows))
    y = jnp.swapaxes(y.astype(x.dtype), 0, 1).reshape(x.shape)
    y = jax.lax.with_sharding_constraint(y, placed.spec("BL.", y.shape))
    return (y, jax.tree.map(jnp.add, sums, more)), told


def _ticks(layer, M, S, arrays, x_MxBxLxD, rows_M, sums):
    """One stage's share, inside shard_map."""
    me = jax.lax.axis_index(AXIS)

    @jax.checkpoint
    def stage(arrays, x, rows):
        def one(carry, layer_arrays):
            return layer(carry, layer_arrays, rows)

        zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), sums)
        (x, added), told = jax.lax.scan(one, (x, zeros), arrays)
        return x, (added, told)

    def tick(carry, t):
        came, total = carry
        turn = t - me
        mine = jnp.clip(turn, 0, M - 1)
        rows = jax.tree.map(lambda a: a[mine], rows_M)
        y, told = stage(arrays, jnp.where(me == 0, x_MxBxLxD[mine], came), rows)
        live = (turn >= 0) & (turn < M)  # else the stage waits, on numbers that mean nothing
        told = jax.tree.map(lambda v: jnp.where(live, v, jnp.zeros_like(v)), told)
        ahead = jax.lax.ppermute(y, AXIS, [(i, i + 1) for i in range(S - 1)])
        return (ahead, jax.tree.map(jnp.add, total, told)), y

    first = jax.tree.map(lambda a: a[0], (x_MxBxLxD, rows_M))
    shape = jax.eval_shape(stage, arrays, *first)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    start = (jnp.zeros_like(first[0]), zeros)
    (_, (added, told)), y = jax.lax.scan(tick, start, jnp.arange(M + S - 1))
    y = jnp.where(me == S - 1, y[S - 1 :], 0)
    return y, jax.tree.map(lambda v: jax.lax.psum(v, AXIS), added), told
