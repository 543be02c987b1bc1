"""A pipeline whose backward passes start before its forward passes are through: 1F1B and ZB-H1.

The gradient is taken inside the schedule. In every tick each stage runs the op that its row of a
table (ticks.py) names: a branch that its neighbours do not take, so a stage that waits costs
nothing. What it makes goes to a neighbour only after ticks that make something for it. A stage
keeps the inputs of at most S micro-batches and computes the rest again.

ZB-H1 computes nothing twice that 1F1B does not: its BACKWARD keeps both sides of the products for
the layers' weights, which is more than a stage's input, and WEIGHTS takes them. To keep less and
compute a stage again in WEIGHTS would take half a step more: both passes again but for the weights.

Devices of one stage take the same branch, so what they send each other in it meets. Permutes do
not on CPU, where they wait for all devices: see ticks.chosen.

The last stage runs a micro-batch's forward and backward pass in one, with the loss between them,
so its FORWARD does nothing. Weights outside the stages' layers, which every stage has and the
first or the last uses, get their gradients in BACKWARD under either schedule.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sparse_pretrain.sharding import apply, delayed, ticks
from sparse_pretrain.sharding.ticks import BACKWARD, FORWARD, IDLE

AXIS = "pipe"


class Parts(NamedTuple):
    """A model and its loss, as functions of (params, fixed) in nested dicts and a micro-batch.

    enter(params, fixed, rows) -> (x, share of the loss, told)
    layers(params, fixed, rows) -> (layer, what the layers read beside their params)
    share(sums) -> share of the loss
    leave(params, fixed, x, rows) -> (share of the loss, told)

    `layer((x, sums), (params, else) of one layer) -> ((x, sums), told)` as in a scan over those
    params that lead with N; sums start at `zeros`. Told and sums are added up over micro-batches.
    """

    enter: Callable[..., Any]
    layers: Callable[..., Any]
    share: Callable[[Any], jax.Array]
    leave: Callable[..., Any]
    zeros: Any


class Grads(NamedTuple):
    """Gradients like the parameters, and what the parts told."""

    params: Any
    entered: Any
    sums: Any
    layers: Any
    left: Any


def gradients(
    placed: apply.Placed,
    parts: Parts,
    params: Any,
    fixed: Any,
    batch: Any,
    dims: Any,
    fixed_dims: Any,
) -> Grads:
    """The gradients of the sum of all shares, over a batch in micro-batches by `placed.schedule`.

    Shapes: leaves of `batch` [B, L]; `dims` and `fixed_dims` name the dims of `params` and `fixed`.
    """
    table = ticks.table(placed.schedule, placed.stages, placed.microbatches)
    inner = placed.inside(AXIS)
    every, own = PartitionSpec(), PartitionSpec(AXIS)

    def lies(tree, names):
        return jax.tree.map(lambda _, n: own if n[:1] == ("N",) else every, tree, names)

    def stage(*args):
        with inner.naming():
            return _Stage(table, parts, inner, dims, *args).run()

    params_lie = lies(params, dims)
    return jax.shard_map(
        stage,
        in_specs=(params_lie, lies(fixed, fixed_dims), every),
        out_specs=Grads(params_lie, every, every, own, every),
        axis_names={AXIS},
        check_vma=False,
    )(params, fixed, jax.tree.map(lambda a: deal(inner, placed.microbatches, a), batch))


def deal(inner: apply.Placed, count: int, a: jax.Array) -> jax.Array:
    """[count, B / count, ..], micro-batch i the rows i, i + count, .. as in accumulation."""
    a = jnp.swapaxes(jnp.reshape(a, (a.shape[0] // count, count, *a.shape[1:])), 0, 1)
    spec = inner.spec(".BL" + "." * (a.ndim - 3), a.shape)
    return jax.lax.with_sharding_constraint(a, spec)


class _Held(NamedTuple):
    """What a stage has between ticks: inputs [slots, b, L, ..], the gradient of its last output,
    what it adds up, and what is kept [delayed, ..] for WEIGHTS.
    """

    inputs: Any
    back: Any
    total: Grads
    kept: Any


class _Made(NamedTuple):
    """What an op makes: `out` for a neighbour, `input` which the first stage makes for itself,
    what is `kept` of this micro-batch.
    """

    out: Any
    input: Any
    total: Grads
    kept: Any


MADE = ("x", "x", "total", "kept")  # what its fields are


class _Stage:
    """One stage's share, inside shard_map."""

    def __init__(self, table, parts, inner, dims, params, fixed, rows_M):
        self.table, self.parts, self.inner, self.dims = table, parts, inner, dims
        self.fixed, self.rows_M = fixed, rows_M
        self.own = {k: v for k, v in params.items() if stacked(dims[k])}
        self.other = {k: v for k, v in params.items() if k not in self.own}
        self.me = jax.lax.axis_index(AXIS)
        self.last = table.stages - 1

    def run(self) -> Grads:
        """All ticks."""
        t = self.table
        x, told = self._shapes()
        self.x = x
        start = _Held(
            jnp.zeros((t.slots, *x.shape), x.dtype),
            _zeros(x),
            Grads(self._hold(_zeros(self.own | self.other)), *_zeros(told)),
            self._room(),
        )
        # the last stage does a micro-batch's forward pass in its BACKWARD
        op = t.op.copy()
        op[:, -1][op[:, -1] == FORWARD] = IDLE
        now = [op, t.micro, t.arrives, t.returns, t.up[1], t.down[1]]
        held, _ = jax.lax.scan(self._tick, start, [jnp.asarray(a) for a in now])
        total = held.total
        grads = {k: v if k in self.own else _everyone(v) for k, v in total.params.items()}
        entered, sums, left = _everyone((total.entered, total.sums, total.left))
        return Grads(grads, entered, sums, total.layers, left)

    def _tick(self, held: _Held, now):
        op, micro, arrives, returns = (a[self.me] for a in now[:4])
        slots = self.table.slots
        rows = jax.tree.map(lambda a: a[jnp.maximum(micro, 0)], self.rows_M)
        ops = [self._wait, self._forward, self._backward]
        if self.table.delayed:
            ops = [self._wait, self._forward, self._backward_inputs, self._weights]
        made = _Made(*self._choose(op, ops, MADE, held, rows, micro))
        above = self._sent(self.table.up[0], 1, now[4], made.out)
        below = self._sent(self.table.down[0], -1, now[5], made.out)
        new = jnp.where(self.me == 0, made.input, above)
        at = arrives % slots
        inputs = held.inputs.at[at].set(jnp.where(arrives >= 0, new, held.inputs[at]))
        back = jnp.where(returns, below, held.back)
        kept = held.kept
        if self.table.delayed:  # stored here: a branch would hold all of it twice
            slot = micro % self.table.delayed
            kept = jax.tree.map(
                lambda a, new: a.at[slot].set(jnp.where(op == BACKWARD, new, a[slot])),
                kept,
                made.kept,
            )
        return _Held(inputs, back, made.total, kept), None

    def _sent(self, sets, step: int, which, a):
        """What a neighbour sends, or zeros: `which` of the sets of stages do."""

        def send(stages, a):
            if not stages:
                return jnp.zeros_like(a)
            return jax.lax.ppermute(a, AXIS, [(s, s + step) for s in stages])

        sends = [lambda a, stages=stages: (send(stages, a),) for stages in sets]
        return self._choose(which, sends, ("x",), a)[0]

    # --- ops

    def _wait(self, held: _Held, rows, micro) -> _Made:
        del rows, micro
        nothing = jnp.zeros_like(held.back)
        return _Made(nothing, nothing, held.total, self._nothing_kept(held))

    def _forward(self, held: _Held, rows, micro) -> _Made:
        (x,) = self._where(
            self.me == 0,
            lambda: (self._enter(self.other, rows)[0][0],),
            lambda: (held.inputs[micro % self.table.slots],),
            ("x",),
        )
        (y, _), _ = self._through(self.own, x, rows)
        return _Made(y, x, held.total, self._nothing_kept(held))

    def _backward(self, held: _Held, rows, micro) -> _Made:
        x = held.inputs[micro % self.table.slots]
        run = functools.partial(self._through, rows=rows)
        (y, _), pull, told = jax.vjp(run, self.own, x, has_aux=True)
        dy, total = self._after(held, y, rows)
        d_own, dx = pull((dy, jnp.ones((), jnp.float32)))
        own = self._add({k: total.params[k] for k in self.own}, d_own)
        total = self._before(total._replace(params=total.params | own), dx, told, rows)
        return _Made(dx, jnp.zeros_like(dx), total, held.kept)

    def _backward_inputs(self, held: _Held, rows, micro) -> _Made:
        """As `_backward`, products for the layers' weights left for `_weights`."""
        x = held.inputs[micro % self.table.slots]
        layers = self._layers(rows)
        (y, sums), told, saved = layers.forward((x, _zeros(self.parts.zeros)))
        dy, total = self._after(held, y, rows)
        (dx, _), now, kept = layers.backward(saved, (dy, jax.grad(self.parts.share)(sums)))
        own = self._hold(delayed.add({k: total.params[k] for k in self.own}, now))
        total = self._before(total._replace(params=total.params | own), dx, (sums, told), rows)
        return _Made(dx, jnp.zeros_like(dx), total, kept)

    def _weights(self, held: _Held, rows, micro) -> _Made:
        layers = self._layers(rows)
        self._kept(layers, rows)  # which says what is left to do
        kept = jax.tree.map(lambda a: a[micro % self.table.delayed], held.kept)
        total = held.total
        own = delayed.add({k: total.params[k] for k in self.own}, layers.weights(kept))
        total = total._replace(params=total.params | self._hold(own))
        nothing = jnp.zeros_like(held.back)
        return _Made(nothing, nothing, total, self._nothing_kept(held))

    def _nothing_kept(self, held: _Held):
        return jax.tree.map(lambda a: jnp.zeros_like(a[0]), held.kept)

    def _layers(self, rows) -> delayed.Stage:
        layer, more = self.parts.layers(self.own | self.other, self.fixed, rows)
        return delayed.Stage(layer, self.own, more)

    def _kept(self, layers: delayed.Stage, rows):
        """Shapes of what one micro-batch keeps for its WEIGHTS."""

        def run(x):
            (y, sums), _, saved = layers.forward((x, _zeros(self.parts.zeros)))
            return layers.backward(saved, (y, sums))[2]

        return jax.eval_shape(run, self.x)

    def _after(self, held: _Held, y, rows):
        """(the gradient of a stage's output, sums): on the last stage the loss is taken here."""
        total = held.total

        def leave(others, left):
            run = functools.partial(self._leave, rows=rows)
            _, pull, told = jax.vjp(run, self.other, y, has_aux=True)
            more, dy = pull(jnp.ones((), jnp.float32))
            return dy, self._add(others, more), _add(left, told)

        others = {k: total.params[k] for k in self.other}
        dy, others, left = self._where(
            self.me == self.last,
            leave,
            lambda *was: (held.back, *was),
            ("x", "grads", "told"),
            others,
            total.left,
        )
        return dy, total._replace(params=total.params | others, left=left)

    def _before(self, total: Grads, dx, told, rows) -> Grads:
        """The sums with what the layers told; on the first stage those of what comes before."""

        def enter(others, entered):
            run = functools.partial(self._enter, rows=rows)
            _, pull, told = jax.vjp(run, self.other, has_aux=True)
            (more,) = pull((dx, jnp.ones((), jnp.float32)))
            return self._add(others, more), _add(entered, told)

        others = {k: total.params[k] for k in self.other}
        others, entered = self._where(
            self.me == 0, enter, lambda *was: was, ("grads", "told"), others, total.entered
        )
        sums, layers = _add((total.sums, total.layers), told)
        return Grads(total.params | others, entered, sums, layers, total.left)

    # --- the parts, as functions to differentiate: ((outputs), what is told)

    def _enter(self, other, rows):
        x, share, told = self.parts.enter(self.own | other, self.fixed, rows)
        return (x, share), told

    def _through(self, own, x, rows):
        layer, more = self.parts.layers(self.other | own, self.fixed, rows)
        (x, sums), told = jax.lax.scan(layer, (x, _zeros(self.parts.zeros)), (own, more))
        return (x, self.parts.share(sums)), (sums, told)

    def _leave(self, other, y, rows):
        return self.parts.leave(self.own | other, self.fixed, y, rows)

    # --- branches

    def _choose(self, which, branches, kinds: tuple[str, ...], *args) -> tuple:
        """`jax.lax.switch`; what branches return lies alike, as the compiler asks.

        `kinds` says of each thing that they return what it is: x, grads, total, told or kept.
        """

        def laid(branch, *args):
            return tuple(map(self._lay, kinds, branch(*args)))

        return jax.lax.switch(which, [functools.partial(laid, b) for b in branches], *args)

    def _where(self, is_so, then, otherwise, kinds, *args) -> tuple:
        return self._choose(is_so.astype(jnp.int32), (otherwise, then), kinds, *args)

    def _lay(self, kind: str, tree):
        """Gradients where they are held, numbers everywhere, and activations by their rows."""
        if kind == "grads":
            return self._hold(tree)
        if kind == "total":
            return Grads(self._hold(tree.params), *(self._lay("told", t) for t in tree[1:]))

        def spec(a):
            if kind == "kept":
                return PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * a.ndim)
            dims = "BL" if kind == "x" else ""
            return self.inner.spec(dims + "." * (a.ndim - len(dims)), a.shape)

        return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, spec(a)), tree)

    # --- shapes and sums

    def _room(self):
        """For what is kept for WEIGHTS, of as many micro-batches as there are at once."""
        if not self.table.delayed:
            return ()
        rows = jax.tree.map(lambda a: a[0], self.rows_M)
        kept = self._kept(self._layers(rows), rows)
        return jax.tree.map(lambda s: jnp.zeros((self.table.delayed, *s.shape), s.dtype), kept)

    def _shapes(self):
        """(x, what is told) of one micro-batch."""
        rows = jax.tree.map(lambda a: a[0], self.rows_M)
        (x, _), entered = jax.eval_shape(self._enter, self.other, rows)
        _, (sums, layers) = jax.eval_shape(self._through, self.own, x, rows)
        _, left = jax.eval_shape(self._leave, self.other, x, rows)
        return x, (entered, sums, layers, left)

    def _hold(self, grads):
        """Gradients where their parameters are stored, a sum over devices taken at once."""

        def one(g, dims):
            spec = self.inner.parameter(dims, g.shape)
            return jax.lax.with_sharding_constraint(g, spec)

        return {k: jax.tree.map(one, g, self.dims[k]) for k, g in grads.items()}

    def _add(self, total, more):
        return _add(total, self._hold(more))


def stacked(dims: Any) -> bool:
    """Whether these are dims of a stack's parameters, which every stage has its own part of."""
    leaves = jax.tree.leaves(dims, is_leaf=lambda x: isinstance(x, tuple))
    return all(names[:1] == ("N",) for names in leaves)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def _everyone(tree: Any) -> Any:
    return jax.tree.map(lambda v: jax.lax.psum(v, AXIS), tree)
