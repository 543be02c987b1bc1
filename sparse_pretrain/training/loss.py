"""The training loss of one batch, from hidden states, without the logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import shapes
from sparse_pretrain.model import lm, mtp
from sparse_pretrain.sharding import ops


def token_losses(
    model: lm.LM, hidden: Float[Array, "B L D"], batch: shapes.Batch
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """(weighted sum of nats + z-loss [], nats per token [B, L])."""
    c = model.config
    head, layout = model.head_weight(hidden.dtype)
    return ops.cross_entropy(
        hidden,
        head,
        batch.targets,
        batch.weights,
        z_loss=c.z_loss,
        softcap=c.softcap or None,
        head_layout=layout,
    )


def loss_sums(definition, params, prices, batch: shapes.Batch, weight, parts: int):
    """This (micro-)batch's share of the loss over the whole batch, and what to report.

    `weight` is the whole batch's total weight and `parts` the number of micro-batches, so that
    shares add up to the large batch's loss.
    Source: MTP's share 2412.19437, equations 24 and 25: every depth over all targets of the batch.
    """
    model = definition.merge(params, prices)
    hidden, aux = model(batch, train=True)
    total, nats = token_losses(model, hidden, batch)
    loss = total / weight + (aux.balance + aux.own) / parts
    told = []
    for depth, further in enumerate(aux.ahead, 1):
        goal = mtp.targets(batch, depth)
        total, each = token_losses(model, further, goal)
        loss = loss + model.config.mtp.weight / len(aux.ahead) * total / weight
        told.append((jnp.sum(each * goal.weights), jnp.sum(goal.weights)))
    market = jax.tree.map(lambda v: v / parts, aux.market)  # summed over parts: their mean
    report = {"nats": jnp.sum(nats * batch.weights), "load": aux.load, "market": market}
    if lm.trains_own(model.config):
        report["indexer_loss"] = aux.own / parts
    if told:
        report["mtp"] = tuple(jnp.stack(sums) for sums in zip(*told, strict=True))
    return loss, report
