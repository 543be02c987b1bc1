"""One optimizer step, as one donated jit: gradients, update, prices, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_pretrain import nn, optim, shapes
from sparse_pretrain.games import prices
from sparse_pretrain.model import lm
from sparse_pretrain.routing.base import market_means
from sparse_pretrain.sharding import apply, offload
from sparse_pretrain.training import loss, partial, pipelined, replace
from sparse_pretrain.training import state as states
from sparse_pretrain.training.state import TrainState

Step = Callable[[TrainState, shapes.Batch], tuple[TrainState, dict[str, Any]]]


def cut(batch: shapes.Batch, length: int) -> shapes.Batch:
    """The batch in rows of `length` tokens, the pieces of a row one after the other.

    A document that goes on past a cut is a document of its own there, with positions from 0, as
    where data/pack.py cuts rows.
    Shapes: [B, L] to [B * L / length, length].
    """
    assert batch.memory is None, "the rows of a memory go by where documents begin"
    new = shapes.Batch(*(jnp.asarray(field).reshape(-1, length) for field in batch.fields))
    segments, positions = new.segments, new.positions
    first = segments[:, :1]
    goes_on = segments == first
    return new._replace(
        segments=jnp.where(segments != 0, segments - first + 1, 0),
        positions=positions - jnp.where(goes_on, positions[:, :1], 0),
    )


def gradients(
    definition: nn.Definition,
    state: TrainState,
    batch: shapes.Batch,
    accumulate: int,
    mask: Any = None,
    placed: apply.Placed | None = None,
    domains: int = 0,
):
    """(gradients of the batch's loss, report of sums); equal to one large batch to rounding.

    They are zero outside the `mask`, if there is one.
    """
    weight = jnp.maximum(jnp.sum(batch.weights), 1.0)

    def sums(params, part):
        def share(p):
            p = p if mask is None else partial.only(mask, p)
            return loss.loss_sums(definition, p, state.router, part, weight, accumulate, domains)

        (_, report), grads = jax.value_and_grad(share, has_aux=True)(params)
        return (grads if placed is None else placed.hold(grads, definition)), report

    if placed is not None and placed.stages > 1 and placed.schedule != "gpipe":
        grads, report = pipelined.gradients(
            definition, state.params, state.router, batch, weight, mask, placed, domains
        )
        return placed.hold(grads, definition), report
    if accumulate == 1:
        return sums(state.params, batch)
    if placed is not None and placed.stages > 1:  # its micro-batches go through a pipeline
        accumulate = 1
        return sums(state.params, batch)
    return optim.accumulate(sums, state.params, optim.split(batch, accumulate))


def make_train_step(
    definition: nn.Definition,
    config: lm.Config,
    tx: optax.GradientTransformationExtraArgs,
    *,
    schedule: Callable,
    accumulate: int = 1,
    ema: float = 0.0,
    seq: int = 0,
    train: str = "all",
    first: int = 0,
    placed: apply.Placed | None = None,
    host: bool = False,
    domains: int = 0,
) -> Step:
    """The jitted step `(state, batch) -> (state, metrics)`; the state it is given is consumed.

    The rows of a batch are cut to `seq` tokens first, if that is not 0. With `train="indexer"` only
    what the attentions train by losses of their own moves, and prices do not; with `train="prices"`
    prices alone, by steps that shorten from step `first` on. `placed` is the plan that the state
    and batches are laid out by, if they are; with `host` the optimizer's state comes from the
    host's memory and goes back there.

    Metrics are device scalars: `loss` nats per token, `bits_per_byte`, `grad_norm`, `lr`,
    `tokens`, and for experts `load` per layer group, `max_vio` per layer, and `market`: the price
    of each expert and the dual objective, where the router has them; `indexer_loss` nats per token
    over all layers, where an attention trains one; `mtp_loss` [depths] nats per token counted;
    `domains` [2, domains] sums of nats and targets, where their number is given.
    """

    def step(state: TrainState, batch: shapes.Batch):
        batch = cut(batch, seq) if seq else batch
        state = state._replace(opt=offload.fetched(state.opt)) if host else state
        mask = None
        if train != "all":
            own = train == "indexer"
            mask = partial.own_mask(config, state.params) if own else partial.no_mask(state.params)
        grads, report = gradients(definition, state, batch, accumulate, mask, placed, domains)
        grads = replace.tied(grads, state.router, config, definition, placed)
        if placed is not None:
            grads = placed.hold(grads, definition, "optimizer")
        norm = replace.gradient_norm(grads, state.router)
        updates, opt = tx.update(grads, state.opt, state.params, norm=norm)
        params = optax.apply_updates(state.params, updates)
        router = lm.move_prices(config, state.router, report["load"], report["market"])
        average = state.ema
        if ema:
            decay = optim.ema.warmed(ema, state.step)
            average = optim.ema.update(state.ema, params, decay)
        tokens = jnp.sum(batch.weights)
        size = jnp.sum(jnp.where(batch.weights > 0, batch.bytes, 0)).astype(jnp.float32)
        metrics = {
            "loss": report["nats"] / jnp.maximum(tokens, 1.0),
            "bits_per_byte": report["nats"]
            / jnp.float32(jnp.log(2.0))
            / jnp.maximum(size, 1.0),
            "grad_norm": norm,
            "lr": schedule(state.step),
            "tokens": tokens,
            "load": report["load"],
            "market": {
                group: {k: v for k, v in market_means(told).items() if k != "proposal"}
                for group, told in report["market"].items()
            },
            "max_vio": jax.tree.map(prices.max_violation, report["load"]),
        }
        if "indexer_loss" in report:
            metrics["indexer_loss"] = report["indexer_loss"]
        if domains:
            metrics["domains"] = report["domains"]
        if "mtp" in report:
            nats, counted = report["mtp"]
            metrics["mtp_loss"] = nats / jnp.maximum(counted, 1.0)
        game = replace.watch(state.game, report["load"])
        new = TrainState(state.step + 1, params, opt, router, game, average, state.key)
        new = new if mask is None else partial.stand_still(mask, state, new)
        if train == "prices":
            new = new._replace(router=partial.settled(state.router, router, state.step - first))
        return new, metrics

    def alone(state: TrainState, batch: shapes.Batch):
        new, metrics = step(state, batch)
        return new._replace(opt=offload.put_back(new.opt)) if host else new, metrics

    if placed is None:
        return jax.jit(alone, donate_argnums=0)

    def laid(state: TrainState, batch: shapes.Batch):
        new, metrics = step(state, batch)
        where = states.shardings(new, definition, placed)
        hold = jax.lax.with_sharding_constraint
        # every process reads the metrics, so they are the same everywhere
        everywhere = jax.tree.map(lambda x: hold(x, placed.replicated), metrics)
        new = jax.tree.map(hold, new, where)
        return new._replace(opt=offload.put_back(new.opt)) if host else new, everywhere

    return placed.jit(laid, donate_argnums=0)
