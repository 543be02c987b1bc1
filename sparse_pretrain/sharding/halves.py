"""A backward pass in two: what others wait for, and the products for weights, which can wait.

It works on what JAX has traced and knows no layer: `first` computes every output that must not
wait and hands on the values that `second` needs for the others, activations and gradients mostly.
An output waits if a product is left to do for it. So gradients of vectors do not wait, and no
product whose op gives another output too: loops that exchange tokens of experts give both. A
shard_map is parted as what it maps is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import PartitionSpec

# ops that only call others, which are looked at one by one
CALLS = (
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
)  # fmt: skip
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # under which name they hold it
# what is worth a delay: products, and ops that hold more than can be seen here
PRODUCTS = (
    "dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated", "scan", "while",
    "cond", "shard_map", "pallas_call",
)  # fmt: skip
# what the second half computes again from something no larger, in place of keeping what comes out
CHEAP = (
    "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
    "reduce_precision", "sharding_constraint", "neg", "copy",
)  # fmt: skip


class Halves(NamedTuple):
    """`first(*inputs) -> (outputs that do not wait, kept)`, `second(*kept, *inputs it reads again)`
    -> outputs that wait.

    `waits` says of each output whether it does, `again` which inputs the second half is given.
    """

    first: Callable[..., tuple[list[Any], list[Any]]]
    second: Callable[..., list[Any]]
    waits: tuple[bool, ...]
    again: tuple[int, ...]


def halves(
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    *,
    may_wait: Sequence[bool],
    there: Sequence[bool] = (),
) -> Halves:
    """The halves of `function(*inputs)`, a sequence of arrays of which some may wait.

    `there` says which inputs are there for the second half too, and need not be kept.
    """
    closed = jax.make_jaxpr(lambda *a: _flat(jax.make_jaxpr(function)(*a), a))(*inputs)
    closed = jax.make_jaxpr(lambda *a: _parted(closed, a, may_wait))(*inputs)
    jaxpr, consts = closed.jaxpr, list(closed.consts)
    there = tuple(there) or (False,) * len(inputs)
    maker = {v: e for e in jaxpr.eqns for v in e.outvars}
    needed = functools.partial(_needed, jaxpr, maker)
    outs = jaxpr.outvars
    early = needed([v for v, w in zip(outs, may_wait, strict=True) if not w])
    waits = tuple(
        w and any(e.primitive.name in PRODUCTS for e in needed([v], early))
        for v, w in zip(outs, may_wait, strict=True)
    )
    now = [v for v, w in zip(outs, waits, strict=True) if not w]
    then = [v for v, w in zip(outs, waits, strict=True) if w]
    early = needed(now)
    late = needed(then, early)
    kept, moved = _boundary(late, then, maker, {*jaxpr.constvars, *jaxpr.invars})
    late = [e for e in jaxpr.eqns if any(e is x for x in (*late, *moved))]
    free = {v for v, is_there in zip(jaxpr.invars, there, strict=True) if is_there}
    again = tuple(i for i, v in enumerate(jaxpr.invars) if v in free and v in kept)
    kept = [v for v in kept if v not in free and v not in jaxpr.constvars]
    run = _sub(jaxpr, [*jaxpr.constvars, *jaxpr.invars], early, [*now, *kept])
    given = [*jaxpr.constvars, *kept, *(jaxpr.invars[i] for i in again)]
    rest = _sub(jaxpr, given, late, then)

    def first(*arrays: Any) -> tuple[list[Any], list[Any]]:
        found = run(*consts, *arrays)
        return found[: len(now)], found[len(now) :]

    return Halves(first, lambda *arrays: rest(*consts, *arrays), waits, again)


def _needed(jaxpr: Any, maker: Any, outs: Sequence[Any], known: Sequence[Any] = ()) -> list[Any]:
    """The equations that these need, in order, but for those known."""
    seen, left, found = {id(e) for e in known}, _variables(outs), set()
    while left:
        eqn = maker.get(left.pop())
        if eqn is None or id(eqn) in seen:
            continue
        seen.add(id(eqn))
        found.add(id(eqn))
        left += _variables(eqn.invars)
    return [e for e in jaxpr.eqns if id(e) in found]


def _parted(closed: Any, arrays: Sequence[Any], may_wait: Sequence[bool]) -> list[Any]:
    """The outputs of something flat, each shard_map with one that may wait in two."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= zip(jaxpr.invars, arrays, strict=True)
    maker = {v: e for e in jaxpr.eqns for v in e.outvars}
    early = _needed(
        jaxpr, maker, [v for v, w in zip(jaxpr.outvars, may_wait, strict=True) if not w]
    )
    wanted = {v for e in early for v in _variables(e.invars)}
    wanted |= {
        v for v, w in zip(jaxpr.outvars, may_wait, strict=True)
        if not w and not isinstance(v, core.Literal)
    }  # fmt: skip
    ids = {id(e) for e in early}
    for eqn in jaxpr.eqns:
        waits = [v not in wanted for v in eqn.outvars]
        if eqn.primitive.name == "shard_map" and id(eqn) in ids and any(waits):
            values = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            env |= zip(eqn.outvars, _two_maps(eqn, values, waits), strict=True)
            continue
        outs = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
        given = list(dict.fromkeys(_variables(eqn.invars)))
        env |= zip(outs, _sub(jaxpr, given, [eqn], outs)(*(env[v] for v in given)), strict=True)
    return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]


def _two_maps(eqn: Any, values: Sequence[Any], may_wait: Sequence[bool]) -> list[Any]:
    """The outputs of a shard_map, from one map for what others wait for and one for the rest.

    Between them go the values of each device, along a new first dim.
    """
    p, made = eqn.params, []
    inner = core.jaxpr_as_fun(core.ClosedJaxpr(p["jaxpr"], ()))
    axes = tuple(a for a in p["mesh"].axis_names if a in p["newly_manual_axes"])
    ins, outs, every = tuple(p["in_specs"]), p["out_specs"], PartitionSpec(axes)
    shared = functools.partial(
        jax.shard_map, axis_names=set(axes), check_vma=p["check_vma"],
    )  # fmt: skip

    def cut(*parts: Any) -> Halves:
        made.append(halves(inner, parts, may_wait=may_wait))
        return made[-1]

    def probe(*parts: Any) -> list[Any]:
        cut(*parts)
        return inner(*parts)

    jax.make_jaxpr(shared(probe, in_specs=ins, out_specs=list(outs)))(*values)
    waits = made[-1].waits
    if not any(waits):
        return shared(inner, in_specs=ins, out_specs=list(outs))(*values)

    def first(*parts: Any) -> tuple[list[Any], list[Any]]:
        now, kept = cut(*parts).first(*parts)
        return now, [k[None] for k in kept]

    def second(kept: list[Any]) -> list[Any]:
        return made[-1].second(*(k[0] for k in kept))

    of = [[s for s, w in zip(outs, waits, strict=True) if w == late] for late in (False, True)]
    now, kept = shared(first, in_specs=ins, out_specs=(of[0], every))(*values)
    then = shared(second, in_specs=(every,), out_specs=of[1])(kept)
    both = iter(now), iter(then)
    return [next(both[w]) for w in waits]


def _flat(closed: Any, arrays: Sequence[Any]) -> list[Any]:
    """The outputs, with ops that only call others taken apart."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= zip(jaxpr.invars, arrays, strict=True)

    def read(v):
        return v.val if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        outs = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
        if eqn.primitive.name in CALLS:
            inner = next(eqn.params[name] for name in INNER if name in eqn.params)
            inner = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
            found = _flat(inner, [read(v) for v in eqn.invars])
            outs = eqn.outvars
        else:
            given = list(dict.fromkeys(_variables(eqn.invars)))
            found = _sub(jaxpr, given, [eqn], outs)(*(env[v] for v in given))
        env |= zip(outs, found, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _sub(jaxpr: Any, given: list[Any], eqns: list[Any], outs: list[Any]) -> Callable[..., Any]:
    """These equations as a function."""
    part = jaxpr.replace(constvars=[], invars=given, eqns=eqns, outvars=outs)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))


def _boundary(late, then, maker, inputs) -> tuple[list[Any], list[Any]]:
    """(what the late equations read of others, the cheap ones to do again so that it is less)."""
    moved: list[Any] = []
    while True:
        made = {v for e in (*late, *moved) for v in e.outvars}
        read = _variables([v for e in (*late, *moved) for v in e.invars] + list(then))
        kept = list(dict.fromkeys(v for v in read if v not in made))
        for v in kept:
            eqn = maker.get(v)
            if v in inputs or eqn is None or eqn.primitive.name not in CHEAP:
                continue
            if sum(_bytes(x) for x in _variables(eqn.invars) if x not in kept) <= _bytes(v):
                moved.append(eqn)
                break
        else:
            return kept, moved


def _bytes(v: Any) -> int:
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize
