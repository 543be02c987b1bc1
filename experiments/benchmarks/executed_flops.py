"""FLOPs of the matrix products a program really runs: its jaxpr, walked with values.

XLA's own count takes a loop's body once, whatever its trips, and both branches of a choice. Here
loops are walked trip by trip and only the branch taken is counted.
"""

import math

import jax
import numpy as np
from jax.extend import core

# Parameters that hold one jaxpr to be run once.
INSIDE = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def executed_flops(call, *arguments) -> int:
    """FLOPs of `call(*arguments)`, a multiply-add as 2; products only, and those that are used."""
    closed = jax.make_jaxpr(call)(*arguments)
    counted = [0]
    _run(closed, jax.tree.leaves(arguments), counted)
    return counted[0]


def _open(jaxpr):
    """(jaxpr, its constants), of one that is closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def _run(jaxpr, arguments, counted):
    jaxpr, consts = _open(jaxpr)
    values = {}

    def read(v):
        return v.val if isinstance(v, core.Literal) else values[v]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    eqns, kept = _used(jaxpr)
    last = {v: i for i, e in enumerate(eqns) for v in e.invars if isinstance(v, core.Var)}
    for i, eqn in enumerate(eqns):
        out = _equation(eqn, [read(v) for v in eqn.invars], counted)
        values.update(zip(eqn.outvars, out, strict=True))
        for v in {v for v in eqn.invars if isinstance(v, core.Var)} - kept:
            if last[v] == i:
                del values[v]  # its memory: a long row's would not fit otherwise
    return [read(v) for v in jaxpr.outvars]


def _used(jaxpr):
    """(the equations that something depends on, the variables of the result)."""
    kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    needed, eqns = set(kept), []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, core.Var))
            eqns.append(eqn)
    return eqns[::-1], kept


def _equation(eqn, arguments, counted):
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        return _while(params, arguments, counted)
    if name == "scan":
        return _scan(eqn, arguments, counted)
    if name == "cond":
        return _run(params["branches"][int(arguments[0])], arguments[1:], counted)
    for key in INSIDE:
        if key in params:
            return _run(params[key], arguments, counted)
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        inner = math.prod(arguments[0].shape[d] for d in contract)
        counted[0] += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    out = eqn.primitive.bind(*arguments, **params)
    return out if eqn.primitive.multiple_results else [out]


def _while(params, arguments, counted):
    n, m = params["cond_nconsts"], params["body_nconsts"]
    cond, body = arguments[:n], arguments[n : n + m]
    carry = arguments[n + m :]
    while bool(_run(params["cond_jaxpr"], [*cond, *carry], counted)[0]):
        carry = _run(params["body_jaxpr"], [*body, *carry], counted)
    return carry


def _scan(eqn, arguments, counted):
    params, body = eqn.params, _open(eqn.params["jaxpr"])[0]
    # what is scanned has a dim more outside than inside, in every JAX that runs this
    whole = [len(v.aval.shape) for v in eqn.invars]
    rows_in = sum(a > len(v.aval.shape) for a, v in zip(whole, body.invars, strict=True))
    whole = [len(v.aval.shape) for v in eqn.outvars]
    m = sum(a == len(v.aval.shape) for a, v in zip(whole, body.outvars, strict=True))
    n = len(arguments) - rows_in - m
    consts, carry, rows = arguments[:n], arguments[n : n + m], arguments[n + m :]
    stacked = []
    order = range(params["length"])
    for i in reversed(order) if params["reverse"] else order:
        out = _run(params["jaxpr"], [*consts, *carry, *(r[i] for r in rows)], counted)
        carry = out[:m]
        stacked.append([np.asarray(o) for o in out[m:]])
    if params["reverse"]:
        stacked.reverse()
    return [*carry, *(jax.numpy.stack(column) for column in zip(*stacked, strict=True))]
