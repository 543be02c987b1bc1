"""The gradients of a batch whose micro-batches go through a pipeline by 1F1B or ZB-H1.

Every micro-batch is embedded, goes through the layers and has its loss taken on its own, as in
gradient accumulation; so the sum is that of accumulation on one device.
"""

from typing import Any

import jax.numpy as jnp

from sparse_pretrain import nn, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.sharding import apply, scheduled
from sparse_pretrain.training import loss, partial


def gradients(
    definition: nn.Definition,
    params: Any,
    prices: Any,
    batch: shapes.Batch,
    weight: Any,
    mask: Any,
    placed: apply.Placed,
    domains: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """As `step.gradients`; `weight` is the whole batch's."""
    parts, config = placed.microbatches, definition.merge(params, prices).config

    def model(params, fixed) -> lm.LM:
        params = params if mask is None else partial.only(mask, params)
        return definition.merge(params, fixed["prices"])

    def enter(params, fixed, rows):
        x, _, told = model(params, fixed).enter(rows, train=True)
        return x, _share(told, parts), _aux(told)

    def layers(params, fixed, rows):
        run, _, more = definition.merge(params, fixed["prices"]).layers(train=True)
        context = (rows.segments, rows.positions, rows.tokens)
        names = [f"stack_{i}" for i in range(len(config.pattern))]

        def layer(carry, xs):
            own, more = xs
            own = own if mask is None else partial.only({k: mask[k] for k in own}, own)
            return run(carry, ([own[name] for name in names], more), context)

        return layer, more

    def leave(params, fixed, x, rows):
        here = model(params, fixed)
        hidden, ahead, told = here.leave(x, rows, train=True)
        share, report = loss.head_sums(here, hidden, ahead, rows, fixed["weight"], domains)
        return share + _share(told, parts), (report, _aux(told))

    def share(sums):
        return (sums[0] + sums[1]) / parts

    zero = jnp.zeros((), jnp.float32)
    found = scheduled.gradients(
        placed,
        scheduled.Parts(enter, layers, share, leave, (zero, zero)),
        params,
        {"prices": prices, "weight": weight},
        batch,
        definition.dims,
        {"prices": definition.price_dims, "weight": ()},
    )
    report, last = found.left
    middle = lm.told(found.sums, found.layers)
    aux = lm.aux([found.entered, middle, last])
    return found.params, report | loss.aux_sums(config, aux, parts)


def _share(told: lm.Told, parts: int) -> Any:
    return jnp.asarray((told.balance + told.own) / parts, jnp.float32)


def _aux(told: lm.Told) -> lm.Told:
    """With arrays where there is no layer to tell anything."""
    return told._replace(
        balance=jnp.asarray(told.balance, jnp.float32), own=jnp.asarray(told.own, jnp.float32)
    )
